// The products of products.h, of tiles that tiles_amx.h makes. Blocks of 2 x 2 tiles stay in the
// registers over all k of a slice. A panel of a's rows, cut into tiles, stays in the second-level
// cache while b's tiles stream past it.
#include "products.h"

#include "instruction_set.h"

#if AIRL_FAST_X86 && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define AIRL_FAST_AMX 1
#else
#define AIRL_FAST_AMX 0
#endif

#if AIRL_FAST_AMX
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "half.h"
#include "parallel.h"

AIRL_FAST_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "rows_kernels.h"
#include "vector_avx512.h"
#include "tiles_amx.h"

namespace airl_fast {
namespace {

constexpr Int kSlice = 1024;                 // k that are summed before the result is written
constexpr Int kPanelBytes = 900 << 10;       // of a's tiles: half of a second-level cache
constexpr Int kColumnBytes = 16 << 20;       // of b's tiles
constexpr Int kStreamBytes = 8 << 20;        // results from here on go past the caches

// k of a slice, when all are as long as they can be alike.
Int slice_of(const Product& p) {
  const Int slices = p.gate ? 1 : (p.k + kSlice - 1) / kSlice;
  return slices == 0 ? p.k : (p.k + slices * kSide - 1) / (slices * kSide) * kSide;
}

// Uninitialised memory that a thread keeps for its next product.
class Scratch {
 public:
  Bits* at_least(Int count) {
    if (count > size_) {
      data_.reset();
      data_.reset(static_cast<Bits*>(std::aligned_alloc(64, static_cast<std::size_t>(count) * 2)));
      size_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(Bits* p) const { std::free(p); }
  };
  std::unique_ptr<Bits, Free> data_;
  Int size_ = 0;
};

struct alignas(64) TileConfig {
  std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Sets up the tiles of a thread, and leaves them as another library may have set them up.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    TileConfig config;
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

#define AIRL_FAST_LOAD_A(part)                   \
  _tile_loadd(4, a + (part) * 2 * kTile, 64);    \
  _tile_loadd(5, a + (part) * 2 * kTile + kTile, 64)
#define AIRL_FAST_LOAD_B(part)                   \
  _tile_loadd(6, b + (part) * 2 * kTile, 64);    \
  _tile_loadd(7, b + (part) * 2 * kTile + kTile, 64)
#define AIRL_FAST_MULTIPLY   \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  _tile_dpbf16ps(2, 5, 6);   \
  _tile_dpbf16ps(3, 5, 7)

// A block of the product [32, 32] into c, from tiles of kA parts of a and kB of b. The least come
// first; neighbours share the tiles of a or of b. `ahead`: what is read next, of which some lines
// are brought into the second-level cache on the way.
template <int kA, int kB>
void multiply_block(const Bits* a, const Bits* b, Int count, float* c, Int stride,
                    const Bits* ahead, Int lines) {
  const std::size_t bytes = static_cast<std::size_t>(stride) * sizeof(float);
  float* lower = c + 16 * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (Int i = 0; i < count; ++i, a += kA * 2 * kTile, b += kB * 2 * kTile) {
    for (Int line = 0; line < lines; ++line, ahead += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    if constexpr (kA == 3 && kB == 3) {
      AIRL_FAST_LOAD_A(0);
      AIRL_FAST_LOAD_B(2);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_B(1);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_A(1);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_B(0);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_A(2);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_A(0);
      AIRL_FAST_MULTIPLY;
    } else if constexpr (kA == 2 && kB == 2) {
      AIRL_FAST_LOAD_A(0);
      AIRL_FAST_LOAD_B(1);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_B(0);
      AIRL_FAST_LOAD_A(1);
      AIRL_FAST_MULTIPLY;
      AIRL_FAST_LOAD_A(0);
      AIRL_FAST_MULTIPLY;
    } else {  // one of the operands is a single part
      static_assert(kA == 1 || kB == 1);
      AIRL_FAST_LOAD_A(kA - 1);
      AIRL_FAST_LOAD_B(kB - 1);
      AIRL_FAST_MULTIPLY;
      if constexpr (kA == 3 || kB == 3) {
        if constexpr (kA == 3) { AIRL_FAST_LOAD_A(1); }
        if constexpr (kB == 3) { AIRL_FAST_LOAD_B(1); }
        AIRL_FAST_MULTIPLY;
      }
      if constexpr (kA > 1 || kB > 1) {
        if constexpr (kA > 1) { AIRL_FAST_LOAD_A(0); }
        if constexpr (kB > 1) { AIRL_FAST_LOAD_B(0); }
        AIRL_FAST_MULTIPLY;
      }
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + 16, bytes);
}

// Where a block of the result goes.
struct Target {
  const Factor* factor;
  Int row, column, rows, columns;  // rows and columns are at most kSide
  float* at() const { return factor->out + row * factor->out_stride + column; }
};

// A block into part of a result; `more`: added to what is there, so that the sums of a slice do not
// lose digits to those before; `last`: with what is to be added; `stream`: past the caches.
void put(const Target& to, const float* block, bool more, bool last, bool stream) {
  const Factor& f = *to.factor;
  const float* plus = last && f.plus != nullptr
                          ? f.plus + to.row * f.plus_stride + to.column : nullptr;
  for (Int i = 0; i < to.rows; ++i, block += kSide) {
    float* out = to.at() + i * f.out_stride;
    for (Int j = 0; j < to.columns; j += 16) {
      const __mmask16 mask = first(to.columns - j);
      __m512 x = _mm512_load_ps(block + j);
      if (more) x = _mm512_add_ps(x, load(out + j, mask));
      if (plus != nullptr) x = _mm512_add_ps(x, load(plus + i * f.plus_stride + j, mask));
      if (stream && mask == 0xffff) {
        _mm512_stream_ps(out + j, x);
      } else {
        _mm512_mask_storeu_ps(out + j, mask, x);
      }
    }
  }
}

// silu(x) y into x.
void gate_block(float* x, const float* y) {
  for (Int i = 0; i < kSide * kSide; i += 16) {
    const __m512 v = _mm512_load_ps(x + i), silu = _mm512_mul_ps(v, sigmoid<Avx512>(v));
    _mm512_store_ps(x + i, _mm512_mul_ps(silu, _mm512_load_ps(y + i)));
  }
}

// A slice of k of one product: b's tiles for all, then a panel of a's at a time.
template <int kA, int kB, typename TA, typename TB>
class Slice {
 public:
  Slice(const Product& product, Int k, int threads)
      : p_(product), k_(k), slice_(std::min(slice_of(product), product.k - k)), threads_(threads) {
    const Int most = std::max<Int>(1, kPanelBytes / (a_block_ * 2));
    Int panels = (row_blocks_ + most - 1) / most;
    panels = (panels + threads - 1) / threads * threads;  // as many for each thread
    panel_ = (row_blocks_ + panels - 1) / panels;
  }

  void run() {
    static thread_local Scratch scratch;
    Int total = 0;
    for (int f = 0; f < p_.count; ++f) total += blocks_of(p_.factors[f].n);
    const Int width = std::max<Int>(2, kColumnBytes / (b_block_ * 2)) / 2 * 2;
    for (Int begin = 0; begin < total; begin += width) {
      const Int end = std::min(begin + width, total);
      Bits* const b = scratch.at_least((end - begin) * b_block_);
      share(end - begin, 1, threads_, [&](Int from, Int to) {
        for (Int j = from; j < to; ++j) fill_columns(begin + j, b + j * b_block_);
      });
      share(row_blocks_, panel_, threads_,
            [&](Int from, Int to) { panel(from, to, begin, end, b); });
    }
  }

 private:
  // Which factor's columns a block holds: gate and what it gates in turn, or one after another.
  Target target(Int block) const {
    int f = 0;
    if (p_.gate) {
      f = static_cast<int>(block % 2);
      block /= 2;
    } else {
      while (block >= blocks_of(p_.factors[f].n)) block -= blocks_of(p_.factors[f++].n);
    }
    const Int column = block * kSide;
    return {&p_.factors[f], 0, column, 0, std::min(kSide, p_.factors[f].n - column)};
  }

  void fill_columns(Int block, Bits* out) const {
    const Target of = target(block);
    fill_block<kB, true, TB>(of.factor->b, of.column, of.columns, k_, slice_, nullptr, nullptr,
                             out);
  }

  void panel(Int from, Int to, Int begin, Int end, const Bits* b) const {
    static thread_local Scratch scratch;
    Bits* const a = scratch.at_least(panel_ * a_block_);
    alignas(64) float block[kSide * kSide], gated[kSide * kSide], scale[kSide];
    for (Int i = from; i < to; ++i) {
      const Int row = i * kSide, rows = std::min(kSide, p_.m - row);
      if (p_.norm != nullptr) inverse_norms(p_, row, rows, scale);
      fill_block<kA, false, TA>(p_.a, row, rows, k_, slice_, scale,
                                p_.norm == nullptr ? nullptr : p_.norm + k_,
                                a + (i - from) * a_block_);
    }
    const Tiles tiles;
    const bool last = k_ + slice_ == p_.k, more = p_.add || k_ > 0;
    const int step = p_.gate ? 2 : 1;
    // The next blocks of b come in bit by bit, while the panel's blocks pass over the present ones.
    const Int lines = (b_block_ / 32 + count_ * (to - from) - 1) / (count_ * (to - from));
    for (Int j = begin; j < end; j += step) {
      Target at = target(j);
      const bool stream = streams(*at.factor), more_to_come = j + step < end;
      for (Int i = from; i < to; ++i) {
        at.row = i * kSide;
        at.rows = std::min(kSide, p_.m - at.row);
        const Bits *x = a + (i - from) * a_block_, *y = b + (j - begin) * b_block_;
        const auto times = [&](const Bits* columns, float* out, Int stride) {
          const Bits* ahead = columns + step * b_block_ + (i - from) * count_ * lines * 32;
          multiply_block<kA, kB>(x, columns, count_, out, stride, ahead,
                                 more_to_come ? lines : 0);
        };
        const bool whole = at.rows == kSide && at.columns == kSide;
        if (whole && !stream && !p_.gate && !more && !(last && at.factor->plus != nullptr)) {
          times(y, at.at(), at.factor->out_stride);
          continue;
        }
        times(y, block, kSide);
        if (p_.gate) {
          times(y + b_block_, gated, kSide);
          gate_block(block, gated);
        }
        put(at, block, more, last, stream);
      }
    }
    _mm_sfence();
  }

  bool streams(const Factor& f) const {
    return slice_ == p_.k && !p_.add && p_.m * f.n * 4 >= kStreamBytes && f.out_stride % 16 == 0 &&
           reinterpret_cast<std::uintptr_t>(f.out) % 64 == 0;
  }

  const Product& p_;
  const Int k_, slice_;
  const int threads_;
  const Int count_ = blocks_of(slice_), row_blocks_ = blocks_of(p_.m);
  const Int a_block_ = count_ * kA * 2 * kTile, b_block_ = count_ * kB * 2 * kTile;
  Int panel_ = 1;
};

template <int kA, int kB, typename TA, typename TB>
void run(const Product& p, int threads) {
  for (Int k = 0; k < p.k; k += slice_of(p)) Slice<kA, kB, TA, TB>(p, k, threads).run();
}

template <typename TA, typename TB>
void run_parts(const Product& p, int parts, int threads) {
  constexpr bool kNarrowA = sizeof(TA) == 2, kNarrowB = sizeof(TB) == 2;
  if (parts == 1 || (kNarrowA && kNarrowB)) return run<1, 1, TA, TB>(p, threads);
  if constexpr (!(kNarrowA && kNarrowB)) {
    if (parts == 2) return run<kNarrowA ? 1 : 2, kNarrowB ? 1 : 2, TA, TB>(p, threads);
    run<kNarrowA ? 1 : 3, kNarrowB ? 1 : 3, TA, TB>(p, threads);
  }
}

// Tiles of bfloat16, AVX-512 with bfloat16, and the system's leave to use the tiles.
bool ask() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 22 & 1u) != 0 && (d >> 24 & 1u) != 0;
  const bool vectors = (b >> 16 & 1u) != 0 && (b >> 17 & 1u) != 0 && (b >> 30 & 1u) != 0 &&
                       (b >> 31 & 1u) != 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  if (!tiles || !vectors || (a >> 5 & 1u) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool products_ready() {
  static const bool ready = ask();
  return ready;
}

void multiply(const Product& p, int parts, int threads) {
  const bool narrow_a = p.a.element == Element::kBFloat16;
  const bool narrow_b = p.factors[0].b.element == Element::kBFloat16;
  if (narrow_a && narrow_b) return run_parts<BFloat16, BFloat16>(p, parts, threads);
  if (narrow_a) return run_parts<BFloat16, float>(p, parts, threads);
  if (narrow_b) return run_parts<float, BFloat16>(p, parts, threads);
  run_parts<float, float>(p, parts, threads);
}

}  // namespace airl_fast
AIRL_FAST_END_TARGET

#else  // no such processor, or a compiler that does not know it

namespace airl_fast {

bool products_ready() { return false; }

void multiply(const Product&, int, int) {}

}  // namespace airl_fast
#endif
