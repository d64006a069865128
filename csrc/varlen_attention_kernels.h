// The kernels of varlen_attention.h, written once over a vector type, as those of rows_kernels.h,
// which includes this.
#pragma once

#include <cstdint>

#include "layer_kernels.h"

namespace airl_fast {

constexpr std::int64_t kPanel = 64;       // keys that lie together, number by number
constexpr std::int64_t kQueryBlock = 48;  // queries, eight tiles of six

// Element (i, k) lies at x[i * row + k * step].
struct Left {
  const float* x;
  std::int64_t row, step;
};

// Which of some keys a query sees.
struct Seen {
  std::int64_t low, high;
};

struct VarlenKernels {
  std::int64_t width;  // of a vector
  // c [rows, columns] = a [rows, inner] b [inner, columns]; columns is a multiple of width. An
  // element is summed in the order of k, whatever the sizes.
  using Multiply = void (*)(std::int64_t rows, std::int64_t columns, std::int64_t inner, Left a,
                            const float* b, std::int64_t b_row, float* c, std::int64_t c_row);
  Multiply multiply, multiply_add;  // the latter adds to what there is in c
  // Scores [columns] become exp(scale score - largest), 0 where not seen, and their sum is added to
  // *sum, after *largest has taken them in. Returns what was summed up before is to be multiplied
  // with. At least one is seen.
  float (*weigh)(std::int64_t columns, float* scores, Seen seen, float scale, float* largest,
                 float* sum);
  // Scores become weights p = exp(scale score - largest) / sum, and their gradients d become
  // scale p (d - mean); both 0 where not seen.
  void (*differentiate)(std::int64_t columns, float* scores, float* d, Seen seen, float scale,
                        float largest, float sum, float mean);
  void (*scale)(std::int64_t count, const float* x, float by, float* out);
  float (*dot)(std::int64_t count, const float* x, const float* y);
};

namespace {

template <class V, bool kAdd, int kVectors, int kRows>
inline void multiply_tile(std::int64_t inner, Left a, const float* b, std::int64_t b_row, float* c,
                          std::int64_t c_row) {
  typename V::F sums[kRows][kVectors];
  for (auto& row : sums) {
    for (auto& sum : row) sum = V::set(0.0f);
  }
  for (std::int64_t k = 0; k < inner; ++k, a.x += a.step, b += b_row) {
    typename V::F row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = V::load(b + j * V::kWidth);
    for (int i = 0; i < kRows; ++i) {
      const auto x = V::set(a.x[i * a.row]);
      for (int j = 0; j < kVectors; ++j) sums[i][j] = V::fma(x, row[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * c_row + j * V::kWidth;
      V::store(to, kAdd ? V::add(V::load(to), sums[i][j]) : sums[i][j]);
    }
  }
}

// All rows of as many columns as kVectors have.
template <class V, bool kAdd, int kVectors>
inline void multiply_columns(std::int64_t rows, std::int64_t inner, Left a, const float* b,
                             std::int64_t b_row, float* c, std::int64_t c_row) {
  for (; rows >= 6; rows -= 6, a.x += 6 * a.row, c += 6 * c_row) {
    multiply_tile<V, kAdd, kVectors, 6>(inner, a, b, b_row, c, c_row);
  }
  switch (rows) {
    case 5: return multiply_tile<V, kAdd, kVectors, 5>(inner, a, b, b_row, c, c_row);
    case 4: return multiply_tile<V, kAdd, kVectors, 4>(inner, a, b, b_row, c, c_row);
    case 3: return multiply_tile<V, kAdd, kVectors, 3>(inner, a, b, b_row, c, c_row);
    case 2: return multiply_tile<V, kAdd, kVectors, 2>(inner, a, b, b_row, c, c_row);
    case 1: return multiply_tile<V, kAdd, kVectors, 1>(inner, a, b, b_row, c, c_row);
    default: return;
  }
}

template <class V, bool kAdd>
void multiply(std::int64_t rows, std::int64_t columns, std::int64_t inner, Left a, const float* b,
              std::int64_t b_row, float* c, std::int64_t c_row) {
  constexpr int kMost = V::kWidth == 16 ? 4 : 2;  // vectors: 24 sums of 32 registers, 12 of 16
  for (; columns >= kMost * V::kWidth; columns -= kMost * V::kWidth) {
    multiply_columns<V, kAdd, kMost>(rows, inner, a, b, b_row, c, c_row);
    b += kMost * V::kWidth;
    c += kMost * V::kWidth;
  }
  switch (columns / V::kWidth) {
    case 3: return multiply_columns<V, kAdd, 3>(rows, inner, a, b, b_row, c, c_row);
    case 2: return multiply_columns<V, kAdd, 2>(rows, inner, a, b, b_row, c, c_row);
    case 1: return multiply_columns<V, kAdd, 1>(rows, inner, a, b, b_row, c, c_row);
    default: return;
  }
}

inline void fill_unseen(std::int64_t columns, float* x, Seen seen, float value) {
  for (std::int64_t j = 0; j < seen.low; ++j) x[j] = value;
  for (std::int64_t j = seen.high; j < columns; ++j) x[j] = value;
}

template <class V>
float weigh(std::int64_t columns, float* scores, Seen seen, float scale, float* largest,
            float* sum) {
  fill_unseen(columns, scores, seen, -HUGE_VALF);
  const auto by = V::set(scale);
  auto top = V::set(-HUGE_VALF);
  each_vector<V>(columns, [&](auto load, auto store) {
    const auto z = V::mul(load(scores), by);
    store(scores, z);
    top = V::max(top, z);
  });
  const float before = *largest, found = V::largest(top);
  *largest = found > before ? found : before;
  // where all scores so far are -inf their weights are 0, and later ones count
  const auto shift = V::set(*largest == -HUGE_VALF ? 0.0f : *largest);
  auto total = V::set(0.0f);
  each_vector<V>(columns, [&](auto load, auto store) {
    const auto e = exponential<V>(V::sub(load(scores), shift));
    store(scores, e);
    total = V::add(total, e);
  });
  const float kept = found > before ? std::exp(before - found) : 1.0f;
  *sum = *sum * kept + V::sum(total);
  return kept;
}

template <class V>
void differentiate_scores(std::int64_t columns, float* scores, float* d, Seen seen, float scale,
                          float largest, float sum, float mean) {
  const auto by = V::set(scale), shift = V::set(largest), share = V::set(1.0f / sum);
  const auto middle = V::set(mean);
  each_vector<V>(columns, [&](auto load, auto store) {
    const auto p = V::mul(exponential<V>(V::sub(V::mul(load(scores), by), shift)), share);
    store(scores, p);
    store(d, V::mul(V::mul(p, V::sub(load(d), middle)), by));
  });
  fill_unseen(columns, scores, seen, 0.0f);
  fill_unseen(columns, d, seen, 0.0f);
}

template <class V>
void scale_all(std::int64_t count, const float* x, float by, float* out) {
  const auto factor = V::set(by);
  each_vector<V>(count, [&](auto load, auto store) { store(out, V::mul(load(x), factor)); });
}

template <class V>
float dot(std::int64_t count, const float* x, const float* y) {
  auto sum = V::set(0.0f);
  each_vector<V>(count, [&](auto load, auto) { sum = V::fma(load(x), load(y), sum); });
  return V::sum(sum);
}

template <class V>
constexpr VarlenKernels varlen_kernels_of() {
  return {V::kWidth, multiply<V, false>, multiply<V, true>, weigh<V>, differentiate_scores<V>, scale_all<V>, dot<V>};
}

}  // namespace
}  // namespace airl_fast
