// The row kernels, written once over a vector type V and compiled for each instruction set.
//
// Everything lies in an unnamed namespace, so that the linker can never take code compiled for one
// instruction set as that of another. V has: F (kWidth floats), load, store, set, add, sub, mul,
// div, fma (a b + c), fnma (c - a b), max, min, abs, with_sign_of, where_less, zero_below, first,
// nearest, times_power_of_two, sum and largest; with kMasks also load_first and store_first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "draw_kernels.h"
#include "half.h"
#include "layer_kernels.h"
#include "row_attention_kernels.h"
#include "rows.h"
#include "varlen_attention_kernels.h"

namespace airl_fast {

struct RowKernels {
  using Read = void (*)(const Chunk&, const Head&, std::int64_t row, std::int64_t target,
                        bool fresh, RowStats* stats, float* logp, float* entropy);
  using Differentiate = void (*)(const Chunk&, const Head&, std::int64_t row, std::int64_t target,
                                 const RowStats& stats, double d_logp, double d_entropy,
                                 void* gradient);
  using Weigh = void (*)(const Chunk&, const Head&, std::int64_t row, std::int64_t target,
                         bool fresh, RowStats* stats, float* logp, float* entropy, float* tangent,
                         float* sums, std::int64_t width);
  Read read[3];  // by Element
  Differentiate differentiate[3];
  Weigh weigh;  // float32
  LayerKernels layer;
  AttendQuery attend_query;
  Draw draw;
  VarlenKernels varlen;
};

const RowKernels& row_kernels();  // of the path that is chosen

const RowKernels& portable_kernels();
const RowKernels& avx2_kernels();
const RowKernels& avx512_kernels();

namespace {

// Logits that are worked on at a time: 8 KiB, which stay in the first-level cache.
constexpr std::int64_t kBlock = 2048;

// exp(x) for x in [-87.3, 88], 0 below, within 1.1 units in the last place. x = n log 2 + r with
// |r| <= log 2 / 2, in two steps (the first constant has 9 bits, so that n times it is exact);
// exp(r) - 1 - r = r^2 P(r), P fitted for the smallest largest relative error, 3e-9.
template <class V>
inline typename V::F exponential(typename V::F x) {
  const auto n = V::nearest(V::mul(x, V::set(1.44269504088896341f)));
  auto r = V::fnma(n, V::set(0.693359375f), x);
  r = V::fnma(n, V::set(-2.12194440054690583e-4f), r);
  auto p = V::set(1.381446685e-03f);
  p = V::fma(p, r, V::set(8.368780418e-03f));
  p = V::fma(p, r, V::set(4.166839422e-02f));
  p = V::fma(p, r, V::set(1.666652011e-01f));
  p = V::fma(p, r, V::set(4.999999341e-01f));
  p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
  return V::zero_below(V::times_power_of_two(p, n), x, -87.0f);
}

// tanh(y), and 1 - tanh(y)^2. Below 5/8 y + y^3 Q(y^2), Q fitted as above (4e-9); beyond it
// 1 - u with u = 2 / (exp(2 |y|) + 1), whose slope u (2 - u) loses no digits where tanh nears 1.
template <class V>
inline void tanh_and_slope(typename V::F y, typename V::F* value, typename V::F* slope) {
  const auto one = V::set(1.0f), two = V::set(2.0f);
  const auto size = V::abs(y), square = V::mul(y, y);
  auto q = V::set(-5.717044953e-03f);
  q = V::fma(q, square, V::set(2.065058722e-02f));
  q = V::fma(q, square, V::set(-5.374349806e-02f));
  q = V::fma(q, square, V::set(1.333149129e-01f));
  q = V::fma(q, square, V::set(-3.333328393e-01f));
  const auto near = V::fma(q, V::mul(square, y), y);
  // min(20, NaN) is NaN: the order of the arguments matters.
  const auto grown = exponential<V>(V::mul(two, V::min(V::set(20.0f), size)));
  const auto u = V::div(two, V::add(grown, one));
  const auto far = V::with_sign_of(V::sub(one, u), y);
  const auto edge = V::set(0.625f);
  *value = V::where_less(size, edge, near, far);
  *slope = V::where_less(size, edge, V::fnma(near, near, one), V::mul(u, V::sub(two, u)));
}

template <class V, class T>
inline typename V::F load_first(const T* data, std::int64_t count) {
  if constexpr (V::kMasks && std::is_same_v<T, float>) return V::load_first(data, count);
  T padded[V::kWidth] = {};
  std::memcpy(padded, data, static_cast<std::size_t>(count) * sizeof(T));
  return V::load(padded);
}

template <class V, class T>
inline void store_first(T* data, typename V::F x, std::int64_t count) {
  if constexpr (V::kMasks && std::is_same_v<T, float>) return V::store_first(data, x, count);
  T padded[V::kWidth];
  V::store(padded, x);
  std::memcpy(data, padded, static_cast<std::size_t>(count) * sizeof(T));
}

// z of logits a[0 .. count) into z, and dz/da over head.slope into slope (unless null or no cap).
template <class V, class T>
inline void shape(const T* a, const float* bias, std::int64_t count, const Head& head, float* z,
                  float* slope) {
  const auto inner = V::set(head.inner), outer = V::set(head.outer);
  const auto one = [&](typename V::F x, typename V::F b, std::int64_t i) {
    x = V::mul(V::add(x, b), inner);
    if (head.outer != 0.0f) {
      typename V::F value, slopes;
      tanh_and_slope<V>(x, &value, &slopes);
      x = V::mul(value, outer);
      if (slope != nullptr) V::store(slope + i, slopes);
    }
    V::store(z + i, x);
  };
  std::int64_t i = 0;
  if (bias == nullptr && head.outer == 0.0f) {
    for (; i + V::kWidth <= count; i += V::kWidth) V::store(z + i, V::mul(V::load(a + i), inner));
  } else {
    const auto none = V::set(0.0f);
    for (; i + V::kWidth <= count; i += V::kWidth) {
      one(V::load(a + i), bias == nullptr ? none : V::load(bias + i), i);
    }
  }
  if (i < count) {
    one(load_first<V>(a + i, count - i),
        bias == nullptr ? V::set(0.0f) : load_first<V>(bias + i, count - i), i);
  }
}

template <class V>
inline float largest_of(const float* z, std::int64_t count) {
  auto even = V::set(z[0]), odd = even;
  std::int64_t i = 0;
  for (; i + 2 * V::kWidth <= count; i += 2 * V::kWidth) {
    even = V::max(even, V::load(z + i));
    odd = V::max(odd, V::load(z + i + V::kWidth));
  }
  float m = V::largest(V::max(even, odd));
  for (; i < count; ++i) m = z[i] > m ? z[i] : m;
  return m;
}

// Adds sum exp(z - m), and sum exp(z - m) (m - z) if kGap; the first is the same number either way.
template <class V, bool kGap>
inline void accumulate(const float* z, std::int64_t count, float m, double* sum, double* gap) {
  const auto top = V::set(m);
  auto s0 = V::set(0.0f), s1 = s0, g0 = s0, g1 = s0;
  std::int64_t i = 0;
  for (; i + 2 * V::kWidth <= count; i += 2 * V::kWidth) {
    const auto x0 = V::sub(V::load(z + i), top), x1 = V::sub(V::load(z + i + V::kWidth), top);
    const auto e0 = exponential<V>(x0), e1 = exponential<V>(x1);
    s0 = V::add(s0, e0);
    s1 = V::add(s1, e1);
    if (kGap) {
      g0 = V::fnma(e0, x0, g0);
      g1 = V::fnma(e1, x1, g1);
    }
  }
  for (; i < count; i += V::kWidth) {
    const std::int64_t left = count - i < V::kWidth ? count - i : V::kWidth;
    const auto x = V::first(V::sub(load_first<V>(z + i, left), top), left);
    const auto e = V::first(exponential<V>(x), left);
    s0 = V::add(s0, e);
    if (kGap) g0 = V::fnma(e, x, g0);
  }
  *sum += V::sum(V::add(s0, s1));
  if (kGap) *gap += V::sum(V::add(g0, g1));
}

// target is a column of this chunk, or lies outside of it; fresh: stats holds nothing yet.
template <class V, class T, bool kGap>
inline void read_row(const Chunk& chunk, const Head& head, std::int64_t row, std::int64_t target,
                     bool fresh, RowStats* stats, float* logp, float* entropy) {
  const T* a = static_cast<const T*>(chunk.logits) + row * chunk.row_stride;
  alignas(64) float z[kBlock];
  if (fresh) *stats = {-HUGE_VAL, 0.0, 0.0, 0.0};
  double sum = stats->sum, gap = stats->gap, target_z = stats->target;
  float largest = static_cast<float>(stats->largest);
  for (std::int64_t start = 0; start < chunk.vocab; start += kBlock) {
    const std::int64_t left = chunk.vocab - start, count = left < kBlock ? left : kBlock;
    shape<V>(a + start, head.bias ? head.bias + start : nullptr, count, head, z, nullptr);
    const float m = largest_of<V>(z, count);
    if (fresh && start == 0) {
      largest = m;
    } else if (m > largest) {  // what was summed so far was relative to a smaller maximum
      const double rise = static_cast<double>(m) - largest, shrink = std::exp(-rise);
      gap = shrink * (gap + rise * sum);
      sum *= shrink;
      largest = m;
    }
    // Nothing but -inf so far: the sum stays 0, and NaN still comes through.
    accumulate<V, kGap>(z, count, largest == -HUGE_VALF ? 0.0f : largest, &sum, &gap);
    if (target >= start && target < start + count) target_z = z[target - start];
  }
  const double log_sum = std::log(sum);
  *stats = {largest, sum, gap, target_z};
  *logp = static_cast<float>((target_z - largest) - log_sum);
  if (kGap) *entropy = static_cast<float>(log_sum + gap / sum);
}

template <class V, class T>
void read(const Chunk& chunk, const Head& head, std::int64_t row, std::int64_t target,
          bool fresh, RowStats* stats, float* logp, float* entropy) {
  const auto kernel = entropy == nullptr ? read_row<V, T, false> : read_row<V, T, true>;
  kernel(chunk, head, row, target, fresh, stats, logp, entropy);
}

// With x = z - m, p = exp(x) / s and g = gap / s, log p + H = x + g, and the gradient at z is
// -exp(x) (d_logp + d_entropy (x + g)) / s, at the target d_logp more.
template <class V, class T>
void differentiate(const Chunk& chunk, const Head& head, std::int64_t row, std::int64_t target,
                   const RowStats& stats, double d_logp, double d_entropy, void* gradients) {
  const T* a = static_cast<const T*>(chunk.logits) + row * chunk.row_stride;
  T* out = static_cast<T*>(gradients) + row * chunk.row_stride;
  alignas(64) float z[kBlock], slope[kBlock];
  const bool capped = head.outer != 0.0f;
  const double scale = head.slope / stats.sum;
  const auto top = V::set(static_cast<float>(stats.largest));
  const auto c0 = V::set(static_cast<float>(-scale * d_logp));
  const auto c1 = V::set(static_cast<float>(-scale * d_entropy));
  const double mean_gap = stats.gap / stats.sum;  // of m - z; log p + H = z - m + mean_gap
  const auto gap = V::set(static_cast<float>(mean_gap));
  for (std::int64_t start = 0; start < chunk.vocab; start += kBlock) {
    const std::int64_t left = chunk.vocab - start, count = left < kBlock ? left : kBlock;
    shape<V>(a + start, head.bias ? head.bias + start : nullptr, count, head, z, slope);
    const auto gradient = [&](std::int64_t i) {
      const auto x = V::sub(V::load(z + i), top);
      auto factor = c0;
      if (d_entropy != 0.0) factor = V::fma(c1, V::add(x, gap), c0);
      const auto g = V::mul(exponential<V>(x), factor);
      return capped ? V::mul(g, V::load(slope + i)) : g;
    };
    std::int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) V::store(out + start + i, gradient(i));
    if (i < count) store_first<V>(out + start + i, gradient(i), count - i);
    if (target >= start && target < start + count) {
      const std::int64_t at = target - start;
      // Computed apart, in double, and stored once: 1 - p loses digits in float where p nears 1.
      const double x = static_cast<double>(z[at]) - stats.largest;
      const double p = std::exp(x) / stats.sum;
      const double g = d_logp * (1.0 - p) - d_entropy * p * (x + mean_gap);
      narrow(static_cast<float>(head.slope * g * (capped ? slope[at] : 1.0f)), out + target);
    }
  }
}

// Makes what was added up so far relative to a new largest z, which is above the one before.
inline void rescale(double rise, RowStats* stats, float* sums, std::int64_t width) {
  const double shrink = std::exp(-rise);
  stats->gap = shrink * (stats->gap + rise * stats->sum);
  stats->sum *= shrink;
  for (std::int64_t k = 0; k < width; ++k) sums[k] *= static_cast<float>(shrink);
}

template <class V>
void weigh(const Chunk& chunk, const Head& head, std::int64_t row, std::int64_t target, bool fresh,
           RowStats* stats, float* logp, float* entropy, float* tangent, float* sums,
           std::int64_t width) {
  float* a = static_cast<float*>(chunk.logits) + row * chunk.row_stride;
  alignas(64) float z[kBlock], slope[kBlock];
  const auto each_block = [&](float* slopes, auto work) {
    for (std::int64_t start = 0; start < chunk.vocab; start += kBlock) {
      const std::int64_t left = chunk.vocab - start, count = left < kBlock ? left : kBlock;
      shape<V>(a + start, head.bias ? head.bias + start : nullptr, count, head, z, slopes);
      work(start, count);
    }
  };
  if (fresh) *stats = {-HUGE_VAL, 0.0, 0.0, 0.0};
  float largest = static_cast<float>(stats->largest);
  each_block(nullptr, [&](std::int64_t start, std::int64_t count) {
    const float m = largest_of<V>(z, count);
    if ((fresh && start == 0) || m > largest) largest = m;
  });
  if (!fresh && largest > stats->largest) rescale(largest - stats->largest, stats, sums, width);
  stats->largest = largest;

  const bool capped = head.outer != 0.0f;
  const float finite = largest == -HUGE_VALF ? 0.0f : largest;
  const auto top = V::set(finite);
  each_block(slope, [&](std::int64_t start, std::int64_t count) {
    accumulate<V, true>(z, count, finite, &stats->sum, &stats->gap);
    const auto weight = [&](std::int64_t i) {
      const auto e = exponential<V>(V::sub(V::load(z + i), top));
      return capped ? V::mul(e, V::load(slope + i)) : e;
    };
    std::int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) V::store(a + start + i, weight(i));
    if (i < count) store_first<V>(a + start + i, weight(i), count - i);
    if (target >= start && target < start + count) {
      stats->target = z[target - start];
      *tangent = capped ? slope[target - start] : 1.0f;
      a[target] = 0.0f;
    }
  });
  const double log_sum = std::log(stats->sum);
  *logp = static_cast<float>((stats->target - largest) - log_sum);
  *entropy = static_cast<float>(log_sum + stats->gap / stats->sum);
}

template <class V>
const RowKernels& kernels_of() {
  static const RowKernels kernels = {
      {read<V, float>, read<V, BFloat16>, read<V, Float16>},
      {differentiate<V, float>, differentiate<V, BFloat16>, differentiate<V, Float16>},
      weigh<V>,
      layer_kernels_of<V>(),
      attend_query<V>,
      draw<V>,
      varlen_kernels_of<V>()};
  return kernels;
}

}  // namespace
}  // namespace airl_fast
