#include "segments.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "instruction_set.h"
#include "parallel.h"
#include "rows.h"
#include "segments_avx2.h"

namespace airl_fast {
namespace {

// Calls run(first, last) for consecutive spans of some 16,384 values in all.
template <class Run>
void share_spans(Offsets at, int threads, Run run) {
  const std::int64_t total = at.total();
  if (total < kSharedValues || threads <= 1) return run(std::int64_t{0}, at.spans);
  share(at.spans, std::max<std::int64_t>(1, at.spans * 16384 / total), threads, run);
}

constexpr bool kX86 = AIRL_FAST_X86;  // whether segments_avx2.cpp has anything to link to

template <typename T>
bool fits_avx2(View<T> x) {
  return x.stride == 1 && uses_avx2();
}

template <typename T>
double sum_of(View<T> x, std::int64_t begin, std::int64_t end) {
  double sum = 0.0;
  for (std::int64_t i = begin; i < end; ++i) sum += x[i];
  return sum;
}

template <typename T>
void softmax_of(View<T> x, std::int64_t begin, std::int64_t end, float* out) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (std::int64_t i = begin; i < end; ++i) largest = std::max(largest, x[i]);
  for (std::int64_t i = begin; i < end; ++i) sum += std::exp(x[i] - largest);
  for (std::int64_t i = begin; i < end; ++i) {
    out[i] = static_cast<float>(std::exp(x[i] - largest) / sum);
  }
}

template <typename T>
bool scan_of(View<T> x, std::int64_t begin, std::int64_t end, double gamma, bool forwards,
             float* out) {
  double carried = 0.0, strange = 0.0;  // x - x: 0, or NaN from the first x that is not finite
  for (std::int64_t k = 0; k < end - begin; ++k) {
    const std::int64_t i = forwards ? begin + k : end - 1 - k;
    strange += x[i] - x[i];
    carried = x[i] + gamma * carried;
    out[i] = static_cast<float>(carried);
  }
  return strange == 0.0;
}

}  // namespace

bool partitions(Offsets at, std::int64_t total) {
  if (at.cu[0] != 0 || at.total() != total) return false;
  int stuck = 0;  // no early exit: this way it is vector code
  for (std::int64_t s = 0; s < at.spans; ++s) stuck |= at.cu[s + 1] <= at.cu[s];
  return stuck == 0;
}

template <typename T>
void segment_sum(View<T> x, Offsets at, bool mean, int threads, float* out) {
  share_spans(at, threads, [=](std::int64_t first, std::int64_t last) {
    if constexpr (kX86) {
      if (fits_avx2(x)) return avx2_sum(x.data, at, first, last, mean, out);
    }
    for (std::int64_t s = first; s < last; ++s) {
      const double sum = sum_of(x, at.cu[s], at.cu[s + 1]);
      out[s] = static_cast<float>(mean ? sum / static_cast<double>(at.length(s)) : sum);
    }
  });
}

template <typename T>
void segment_last(View<T> x, Offsets at, int threads, float* out) {
  share(at.spans, 8192, threads, [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t s = first; s < last; ++s) out[s] = static_cast<float>(x[at.cu[s + 1] - 1]);
  });
}

template <typename T>
void segment_softmax(View<T> x, Offsets at, int threads, float* out) {
  share_spans(at, threads, [=](std::int64_t first, std::int64_t last) {
    if constexpr (kX86 && std::is_same_v<T, float>) {
      if (fits_avx2(x)) return avx2_softmax(x.data, at, first, last, out);
    }
    for (std::int64_t s = first; s < last; ++s) softmax_of(x, at.cu[s], at.cu[s + 1], out);
  });
}

template <typename T>
bool discounted_scan(View<T> x, Offsets at, double gamma, bool forwards, int threads, float* out) {
  std::atomic<bool> finite{true};
  share_spans(at, threads, [&](std::int64_t first, std::int64_t last) {
    if constexpr (kX86) {
      if (fits_avx2(x)) {
        if (!avx2_scan(x.data, at, first, last, gamma, forwards, out)) finite = false;
        return;
      }
    }
    for (std::int64_t s = first; s < last; ++s) {
      if (!scan_of(x, at.cu[s], at.cu[s + 1], gamma, forwards, out)) finite = false;
    }
  });
  return finite;
}

void segment_spread(View<float> g, Offsets at, bool mean, int threads, float* out) {
  share_spans(at, threads, [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t s = first; s < last; ++s) {
      const float value = g.data[s * g.stride];
      std::fill(out + at.cu[s], out + at.cu[s + 1],
                mean ? value / static_cast<float>(at.length(s)) : value);
    }
  });
}

void segment_softmax_gradient(const float* p, View<float> g, Offsets at, int threads, float* out) {
  share_spans(at, threads, [=](std::int64_t first, std::int64_t last) {
    if constexpr (kX86) {
      if (fits_avx2(g)) return avx2_softmax_gradient(p, g.data, at, first, last, out);
    }
    for (std::int64_t s = first; s < last; ++s) {
      double pulled = 0.0;
      for (std::int64_t i = at.cu[s]; i < at.cu[s + 1]; ++i) pulled += p[i] * g[i];
      for (std::int64_t i = at.cu[s]; i < at.cu[s + 1]; ++i) {
        out[i] = p[i] * (g.data[i * g.stride] - static_cast<float>(pulled));
      }
    }
  });
}

#define AIRL_FAST_INSTANTIATE(T)                                                    \
  template void segment_sum<T>(View<T>, Offsets, bool, int, float*);                \
  template void segment_last<T>(View<T>, Offsets, int, float*);                     \
  template void segment_softmax<T>(View<T>, Offsets, int, float*);                  \
  template bool discounted_scan<T>(View<T>, Offsets, double, bool, int, float*);
AIRL_FAST_INSTANTIATE(float)
AIRL_FAST_INSTANTIATE(double)
#undef AIRL_FAST_INSTANTIATE

}  // namespace airl_fast
