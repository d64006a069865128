#include "varlen_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "parallel.h"
#include "rows_kernels.h"

namespace airl_fast {
namespace {

using Int = std::int64_t;

// The queries [first, last) of a segment with one head of keys: one piece of work.
struct Piece {
  const VarlenSegment* segment;
  Int first, last, key_head;
  Int low;        // the first key that any of them sees, down to a whole chunk of keys
  float* sums;    // gradients at its keys and values, [keys, padded size] each

  // Keys are counted through the shared ones and on through the own.
  Int keys() const { return segment->shared + last - low; }
  Int panels() const { return (keys() + kPanel - 1) / kPanel; }
  Int cost() const { return (last - first) * (2 * keys() - (last - first)); }
};

constexpr Int kChunk = 8 * kPanel;      // keys whose scores are held at a time
constexpr Int kScoreRow = kChunk + 16;  // floats from row to row: not a power of two

Int rounded_up(Int count, Int to) { return (count + to - 1) / to * to; }

// Pieces of part(queries) queries of each segment.
template <class Part>
std::vector<Piece> pieces_of(const VarlenSizes& sizes, const VarlenInputs& in, Part part) {
  std::vector<Piece> pieces;
  for (Int s = 0; s < in.count; ++s) {
    const VarlenSegment& segment = in.segments[s];
    const Int step = part(segment.queries);
    for (Int first = 0; first < segment.queries; first += step) {
      const Int last = std::min(first + step, segment.queries);
      const Int seen = std::max<Int>(0, segment.shared + first - (sizes.window - 1));
      const Int low = seen / kChunk * kChunk;
      for (Int h = 0; h < sizes.key_heads; ++h) {
        pieces.push_back({&segment, first, last, h, low, nullptr});
      }
    }
  }
  return pieces;
}

// Calls run(piece, scratch) for all, the longest first, with `floats(piece)` floats of scratch.
template <class Floats, class Run>
void for_pieces(std::vector<Piece>& pieces, int threads, Floats floats, Run run) {
  std::vector<const Piece*> order;
  Int most = 0;
  for (const Piece& piece : pieces) {
    order.push_back(&piece);
    most = std::max(most, floats(piece));
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const Piece* a, const Piece* b) { return a->cost() > b->cost(); });
  const Int workers = std::min<Int>(threads, static_cast<Int>(order.size()));
  std::vector<std::unique_ptr<float[]>> scratch;  // here, where running out of memory can be told
  for (Int i = 0; i < workers; ++i) scratch.emplace_back(new float[static_cast<std::size_t>(most)]);
  std::atomic<std::size_t> next{0};
  share(workers, 1, threads, [&](Int begin, Int end) {
    for (Int i = begin; i < end; ++i) {
      for (std::size_t p; (p = next.fetch_add(1)) < order.size();) {
        run(*order[p], scratch[static_cast<std::size_t>(i)].get());
      }
    }
  });
}

// Calls run(head of a token, its place among the piece's keys).
template <class Run>
void each_key(const Piece& piece, const PackedHeads& heads, Run run) {
  const VarlenSegment& s = *piece.segment;
  const float* x = heads.x + piece.key_head * heads.head;
  for (Int j = piece.low; j < s.shared + piece.last; ++j) {
    const Int token = j < s.shared ? s.first_shared + j : s.first_own + j - s.shared;
    run(x + token * heads.token, j - piece.low);
  }
}

// Keys [panel][size][kPanel], with 0 for those that are none.
void transpose(const Piece& piece, const PackedHeads& heads, Int size, float* out) {
  const Int panel = size * kPanel;
  if (piece.keys() % kPanel) std::fill_n(out + (piece.panels() - 1) * panel, panel, 0.0f);
  each_key(piece, heads, [&](const float* key, Int j) {
    float* column = out + j / kPanel * panel + j % kPanel;
    for (Int e = 0; e < size; ++e) column[e * kPanel] = key[e];
  });
}

// Rows of `padded` floats, 0 from `size` on.
void copy_row(const float* from, Int size, Int padded, float* to) {
  std::copy_n(from, size, to);
  std::fill(to + size, to + padded, 0.0f);
}

void copy_keys(const Piece& piece, const PackedHeads& heads, Int size, Int padded, float* out) {
  each_key(piece, heads,
           [&](const float* x, Int j) { copy_row(x, size, padded, out + j * padded); });
}

// A block of queries of one head, against keys that some of them see, `width` at a time.
struct Block {
  const Piece& piece;
  const VarlenSizes& sizes;
  Int first, rows;  // queries, counted in the segment

  Int query() const { return piece.segment->first_query + first; }
  Int place(Int row) const { return piece.segment->shared + first + row - piece.low; }
  Int end() const { return place(rows - 1) + 1; }
  Int begin(Int width) const {
    return std::max<Int>(0, place(0) - (sizes.window - 1)) / width * width;
  }
  // What a row sees of the keys [first_key, first_key + count).
  Seen seen(Int row, Int first_key, Int count) const {
    const Int at = place(row) - first_key;
    return {std::max<Int>(0, at - (sizes.window - 1)), std::min(count, at + 1)};
  }
};

template <class Run>
void each_block(const VarlenSizes& sizes, const Piece& piece, Run run) {
  const Int group = sizes.heads / sizes.key_heads;
  for (Int g = 0; g < group; ++g) {
    for (Int i = piece.first; i < piece.last; i += kQueryBlock) {
      run(Block{piece, sizes, i, std::min(kQueryBlock, piece.last - i)},
          piece.key_head * group + g);
    }
  }
}

}  // namespace

void attend_segments(const VarlenSizes& sizes, const VarlenInputs& in, float* out,
                     float* statistics, int threads) {
  const VarlenKernels& kernel = row_kernels().varlen;
  const Int size = sizes.size, value_size = sizes.value_size;
  const Int padded = rounded_up(value_size, kernel.width);
  Int queries = 0;
  for (Int s = 0; s < in.count; ++s) queries += in.segments[s].queries;
  const Int wanted = queries * sizes.key_heads / (4 * threads);  // some pieces for every thread
  const Int part = rounded_up(std::max<Int>(wanted, 2 * kQueryBlock), kQueryBlock);
  auto pieces = pieces_of(sizes, in, [=](Int) { return part; });
  const auto floats = [&](const Piece& piece) {
    return piece.panels() * kPanel * (size + padded) + kQueryBlock * (kScoreRow + padded);
  };
  for_pieces(pieces, threads, floats, [&](const Piece& piece, float* scratch) {
    float* keys = scratch;
    float* values = keys + piece.panels() * kPanel * size;
    float* scores = values + piece.panels() * kPanel * padded;
    float* sums = scores + kQueryBlock * kScoreRow;
    transpose(piece, in.keys, size, keys);
    copy_keys(piece, in.values, value_size, padded, values);

    each_block(sizes, piece, [&](const Block& block, Int head) {
      float largest[kQueryBlock], sum[kQueryBlock] = {};
      std::fill_n(largest, kQueryBlock, -HUGE_VALF);
      const Left query{in.queries.x + block.query() * in.queries.token + head * in.queries.head,
                       in.queries.token, 1};
      const Int begin = block.begin(kChunk), end = block.end();
      for (Int key = begin; key < end; key += kChunk) {
        const Int count = std::min(kChunk, end - key);
        const Int columns = rounded_up(count, kernel.width);
        for (Int j = 0; j < columns; j += kPanel) {
          kernel.multiply(block.rows, std::min(kPanel, columns - j), size, query,
                          keys + (key + j) * size, kPanel, scores + j, kScoreRow);
        }
        for (Int r = 0; r < block.rows; ++r) {
          float* row = scores + r * kScoreRow;
          const Seen own = block.seen(r, key, count);
          if (own.low >= own.high) {
            std::fill_n(row, columns, 0.0f);
            continue;
          }
          const float kept = kernel.weigh(columns, row, own, sizes.scale, largest + r, sum + r);
          float* before = sums + r * padded;
          if (key > begin && kept != 1.0f) kernel.scale(padded, before, kept, before);
        }
        const auto add = key == begin ? kernel.multiply : kernel.multiply_add;
        add(block.rows, padded, count, {scores, kScoreRow, 1}, values + key * padded, padded, sums,
            padded);
      }
      for (Int r = 0; r < block.rows; ++r) {
        const Int at = (block.query() + r) * sizes.heads + head;
        kernel.scale(value_size, sums + r * padded, 1.0f / sum[r], out + at * value_size);
        if (statistics == nullptr) continue;
        statistics[2 * at] = largest[r];
        statistics[2 * at + 1] = sum[r];
      }
    });
  });
}

namespace {

constexpr Int kTokens = 128;  // whose gradients are added up at a time

// The pieces that see any of each kTokens tokens, in order.
std::vector<std::vector<const Piece*>> pieces_by_token(const std::vector<Piece>& pieces,
                                                       Int tokens) {
  std::vector<std::vector<const Piece*>> found(
      static_cast<std::size_t>((tokens + kTokens - 1) / kTokens));
  for (const Piece& piece : pieces) {
    const VarlenSegment& s = *piece.segment;
    const auto see = [&](Int first, Int count) {
      for (Int b = first / kTokens; count > 0 && b <= (first + count - 1) / kTokens; ++b) {
        auto& there = found[static_cast<std::size_t>(b)];
        if (there.empty() || there.back() != &piece) there.push_back(&piece);
      }
    };
    see(s.first_shared, s.shared);
    see(s.first_own, piece.last);
  }
  return found;
}

// Adds up what the pieces have for each key.
void add_pieces(const VarlenSizes& sizes, const std::vector<Piece>& pieces, Int padded,
                Int value_padded, const VarlenGradients& to, int threads) {
  const auto by_token = pieces_by_token(pieces, to.tokens);
  const auto add = [&](const Piece& piece, Int token, Int key, Int count) {
    const Int keys = piece.keys(), heads = sizes.key_heads;
    for (Int i = 0; i < count; ++i) {
      const float* d_key = piece.sums + (key + i) * padded;
      const float* d_value = piece.sums + keys * padded + (key + i) * value_padded;
      const Int at = (token + i) * heads + piece.key_head;
      for (Int e = 0; e < sizes.size; ++e) to.keys[at * sizes.size + e] += d_key[e];
      for (Int e = 0; e < sizes.value_size; ++e) {
        to.values[at * sizes.value_size + e] += d_value[e];
      }
    }
  };
  share(static_cast<Int>(by_token.size()), 1, threads, [&](Int begin, Int end) {
    const Int first = begin * kTokens, last = std::min(end * kTokens, to.tokens);
    const Int size = sizes.key_heads * sizes.size, value = sizes.key_heads * sizes.value_size;
    std::fill(to.keys + first * size, to.keys + last * size, 0.0f);
    std::fill(to.values + first * value, to.values + last * value, 0.0f);
    // The piece's keys [from, until), which are the tokens from `token` on.
    const auto part = [&](const Piece& piece, Int from, Int until, Int token) {
      const Int low = std::max(from, piece.low);
      token += low - from;
      const Int skipped = std::max<Int>(0, first - token);
      const Int count = std::min(until - low, last - token) - skipped;
      if (count > 0) add(piece, token + skipped, low - piece.low + skipped, count);
    };
    for (Int b = begin; b < end; ++b) {
      for (const Piece* piece : by_token[static_cast<std::size_t>(b)]) {
        const VarlenSegment& s = *piece->segment;
        part(*piece, 0, s.shared, s.first_shared);
        part(*piece, s.shared, s.shared + piece->last, s.first_own);
      }
    }
  });
}

// Rows whose ends a vector may read.
struct Rows {
  const float* x;
  Int row;
  Left left() const { return {x, row, 1}; }
};

// A block's rows of `size` numbers: where they are, or padded with 0.
Rows rows_of(const PackedHeads& heads, const Block& block, Int head, Int size, Int padded,
             float* scratch) {
  const float* x = heads.x + block.query() * heads.token + head * heads.head;
  if (size == padded) return {x, heads.token};
  for (Int r = 0; r < block.rows; ++r) {
    copy_row(x + r * heads.token, size, padded, scratch + r * padded);
  }
  return {scratch, padded};
}

}  // namespace

void differentiate_segments(const VarlenSizes& sizes, const VarlenInputs& in, const float* out,
                            const float* statistics, PackedHeads d_out,
                            const VarlenGradients& gradients, int threads) {
  const VarlenKernels& kernel = row_kernels().varlen;
  const Int size = sizes.size, value_size = sizes.value_size;
  const Int padded = rounded_up(size, kernel.width);
  const Int value_padded = rounded_up(value_size, kernel.width);
  // Where sums are added up depends on the segment alone.
  auto pieces = pieces_of(sizes, in, [](Int count) { return std::max<Int>(512, (count + 3) / 4); });
  Int all = 0;
  for (const Piece& piece : pieces) all += piece.keys() * (padded + value_padded);
  const std::unique_ptr<float[]> memory(new float[static_cast<std::size_t>(all)]);
  all = 0;
  for (Piece& piece : pieces) {
    piece.sums = memory.get() + all;
    all += piece.keys() * (padded + value_padded);
  }
  const auto floats = [&](const Piece& piece) {
    return piece.panels() * kPanel * (size + padded + value_size) +
           kQueryBlock * (2 * kPanel + 2 * padded + value_padded);
  };
  for_pieces(pieces, threads, floats, [&](const Piece& piece, float* scratch) {
    const auto take = [&](Int count) {
      float* taken = scratch;
      scratch += count;
      return taken;
    };
    float* columns_of_keys = take(piece.panels() * kPanel * size);
    float* columns_of_values = take(piece.panels() * kPanel * value_size);
    float* keys = take(piece.panels() * kPanel * padded);
    float *weights = take(kQueryBlock * kPanel), *d_scores = take(kQueryBlock * kPanel);
    float *padded_query = take(kQueryBlock * padded), *d_query = take(kQueryBlock * padded);
    float* padded_upstream = take(kQueryBlock * value_padded);
    float *d_keys = piece.sums, *d_values = piece.sums + piece.keys() * padded;
    transpose(piece, in.keys, size, columns_of_keys);
    transpose(piece, in.values, value_size, columns_of_values);
    copy_keys(piece, in.keys, size, padded, keys);
    std::fill_n(piece.sums, piece.keys() * (padded + value_padded), 0.0f);

    each_block(sizes, piece, [&](const Block& block, Int head) {
      const Rows query = rows_of(in.queries, block, head, size, padded, padded_query);
      const Rows upstream =
          rows_of(d_out, block, head, value_size, value_padded, padded_upstream);
      float mean[kQueryBlock];
      for (Int r = 0; r < block.rows; ++r) {
        const Int at = (block.query() + r) * sizes.heads + head;
        mean[r] = kernel.dot(value_size, upstream.x + r * upstream.row, out + at * value_size);
      }
      const Int begin = block.begin(kPanel), end = block.end();
      for (Int key = begin; key < end; key += kPanel) {
        const Int count = std::min(kPanel, end - key);
        const Int columns = rounded_up(count, kernel.width);
        kernel.multiply(block.rows, columns, size, query.left(), columns_of_keys + key * size,
                        kPanel, weights, kPanel);
        kernel.multiply(block.rows, columns, value_size, upstream.left(),
                        columns_of_values + key * value_size, kPanel, d_scores, kPanel);
        for (Int r = 0; r < block.rows; ++r) {
          float *row = weights + r * kPanel, *d = d_scores + r * kPanel;
          const Seen own = block.seen(r, key, count);
          if (own.low >= own.high) {
            std::fill_n(row, columns, 0.0f);
            std::fill_n(d, columns, 0.0f);
            continue;
          }
          const float* statistic = statistics + 2 * ((block.query() + r) * sizes.heads + head);
          kernel.differentiate(columns, row, d, own, sizes.scale, statistic[0], statistic[1],
                               mean[r]);
        }
        kernel.multiply_add(count, value_padded, block.rows, {weights, 1, kPanel}, upstream.x,
                            upstream.row, d_values + key * value_padded, value_padded);
        kernel.multiply_add(count, padded, block.rows, {d_scores, 1, kPanel}, query.x, query.row,
                            d_keys + key * padded, padded);
        const auto add = key == begin ? kernel.multiply : kernel.multiply_add;
        add(block.rows, padded, count, {d_scores, kPanel, 1}, keys + key * padded, padded, d_query,
            padded);
      }
      for (Int r = 0; r < block.rows; ++r) {
        const Int at = (block.query() + r) * sizes.heads + head;
        std::copy_n(d_query + r * padded, size, gradients.queries + at * size);
      }
    });
  });
  add_pieces(sizes, pieces, padded, value_padded, gradients, threads);
}

}  // namespace airl_fast
