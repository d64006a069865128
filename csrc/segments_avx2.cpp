#include "instruction_set.h"
#if AIRL_FAST_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "rows.h"
#include "segments_avx2.h"

AIRL_FAST_BEGIN_TARGET("avx2,fma,f16c")
#include "rows_kernels.h"
#include "vector_avx2.h"

namespace airl_fast {
namespace {

using D = __m256d;  // four doubles

inline D load4(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
inline D load4(const double* x) { return _mm256_loadu_pd(x); }

inline double added(D x) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// The first `count` (0 to 8) lanes set.
inline __m256i lanes(std::int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

inline D low(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline D high(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

template <typename T>
inline double sum_of(const T* x, std::int64_t count) {
  D a = _mm256_setzero_pd(), b = a, c = a, d = a;
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    a = _mm256_add_pd(a, load4(x + i));
    b = _mm256_add_pd(b, load4(x + i + 4));
    c = _mm256_add_pd(c, load4(x + i + 8));
    d = _mm256_add_pd(d, load4(x + i + 12));
  }
  for (; i + 4 <= count; i += 4) a = _mm256_add_pd(a, load4(x + i));
  double rest = 0.0;
  for (; i < count; ++i) rest += static_cast<double>(x[i]);
  return added(_mm256_add_pd(_mm256_add_pd(a, b), _mm256_add_pd(c, d))) + rest;
}

// max(x, m) is m where x is NaN: the sum of the exponentials lets it through.
inline float largest_in(const float* x, std::int64_t count) {
  const __m256 lowest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  __m256 even = lowest, odd = lowest;
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    even = _mm256_max_ps(_mm256_loadu_ps(x + i), even);
    odd = _mm256_max_ps(_mm256_loadu_ps(x + i + 8), odd);
  }
  for (; i < count; i += 8) {
    const __m256i keep = lanes(count - i);
    const __m256 values = _mm256_blendv_ps(lowest, _mm256_maskload_ps(x + i, keep),
                                           _mm256_castsi256_ps(keep));
    even = _mm256_max_ps(values, even);
  }
  return Avx2::largest(_mm256_max_ps(even, odd));
}

inline void softmax_of(const float* x, std::int64_t count, float* out) {
  const __m256 top = _mm256_set1_ps(largest_in(x, count));
  D even = _mm256_setzero_pd(), odd = even;
  std::int64_t i = 0;
  const auto add = [&](__m256 e) {
    even = _mm256_add_pd(even, low(e));
    odd = _mm256_add_pd(odd, high(e));
  };
  for (; i + 8 <= count; i += 8) {
    const __m256 e = exponential<Avx2>(_mm256_sub_ps(_mm256_loadu_ps(x + i), top));
    _mm256_storeu_ps(out + i, e);
    add(e);
  }
  const __m256i keep = lanes(count - i);
  if (i < count) {
    const __m256 e = exponential<Avx2>(_mm256_sub_ps(_mm256_maskload_ps(x + i, keep), top));
    _mm256_maskstore_ps(out + i, keep, e);
    add(_mm256_and_ps(e, _mm256_castsi256_ps(keep)));
  }
  const double sum = added(_mm256_add_pd(even, odd));
  const __m256 scale = _mm256_set1_ps(static_cast<float>(1.0 / sum));
  for (i = 0; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(out + i), scale));
  }
  if (i < count) {
    _mm256_maskstore_ps(out + i, keep, _mm256_mul_ps(_mm256_maskload_ps(out + i, keep), scale));
  }
}

inline void softmax_gradient_of(const float* p, const float* g, std::int64_t count, float* out) {
  D even = _mm256_setzero_pd(), odd = even;
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    even = _mm256_fmadd_pd(load4(p + i), load4(g + i), even);
    odd = _mm256_fmadd_pd(load4(p + i + 4), load4(g + i + 4), odd);
  }
  double rest = 0.0;
  for (std::int64_t k = i; k < count; ++k) rest += static_cast<double>(p[k]) * g[k];
  const float pulled = static_cast<float>(added(_mm256_add_pd(even, odd)) + rest);
  const __m256 all = _mm256_set1_ps(pulled);
  for (i = 0; i + 8 <= count; i += 8) {
    const __m256 apart = _mm256_sub_ps(_mm256_loadu_ps(g + i), all);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(p + i), apart));
  }
  for (; i < count; ++i) out[i] = p[i] * (g[i] - pulled);
}

// Four steps at a time. Within them y[j] = x[j] + gamma x[j'] + ..., j' the steps before j in the
// direction of the scan, takes two rounds of doubling; what was carried in is added at the end, so
// that the only chain from one four to the next is one multiply-add.
template <bool kForwards>
struct Fours {
  D once, twice, powers, all;  // gamma; its square; gamma^k k steps in, from 1; its fourth power

  explicit Fours(double gamma) {
    const double square = gamma * gamma;
    once = _mm256_set1_pd(gamma);
    twice = _mm256_set1_pd(square);
    all = _mm256_set1_pd(square * square);
    powers = kForwards ? _mm256_setr_pd(gamma, square, square * gamma, square * square)
                       : _mm256_setr_pd(square * square, square * gamma, square, gamma);
  }

  // By one step and by two, in the direction of the scan; zeros come in.
  static D moved(D x) {
    const D zero = _mm256_setzero_pd();
    return kForwards ? _mm256_blend_pd(_mm256_permute4x64_pd(x, 0x90), zero, 0x1)
                     : _mm256_blend_pd(_mm256_permute4x64_pd(x, 0xf9), zero, 0x8);
  }
  static D moved_twice(D x) {
    return kForwards ? _mm256_permute2f128_pd(x, x, 0x08) : _mm256_permute2f128_pd(x, x, 0x81);
  }
  static D last(D y) { return _mm256_permute4x64_pd(y, kForwards ? 0xff : 0x00); }

  // The results, given those `carried` in (in every lane), which become those carried out.
  D results(D x, D* carried) const {
    D y = _mm256_fmadd_pd(once, moved(x), x);
    y = _mm256_fmadd_pd(twice, moved_twice(y), y);
    const D out = _mm256_fmadd_pd(powers, *carried, y);
    *carried = _mm256_fmadd_pd(all, *carried, last(y));
    return out;
  }
};

template <bool kForwards, typename T>
bool scan(const T* x, Offsets at, std::int64_t first, std::int64_t last, double gamma,
          float* out) {
  const Fours<kForwards> fours(gamma);
  D strange = _mm256_setzero_pd();  // x - x: 0, or NaN from the first x that is not finite
  double strange_rest = 0.0;
  for (std::int64_t s = first; s < last; ++s) {
    const std::int64_t begin = at.cu[s], count = at.length(s), whole = count / 4 * 4;
    D carried = _mm256_setzero_pd();
    for (std::int64_t k = 0; k < whole; k += 4) {
      const std::int64_t i = begin + (kForwards ? k : count - 4 - k);
      const D values = load4(x + i);
      strange = _mm256_add_pd(strange, _mm256_sub_pd(values, values));
      _mm_storeu_ps(out + i, _mm256_cvtpd_ps(fours.results(values, &carried)));
    }
    double following = _mm256_cvtsd_f64(carried);
    for (std::int64_t k = whole; k < count; ++k) {
      const std::int64_t i = begin + (kForwards ? k : count - 1 - k);
      const double value = static_cast<double>(x[i]);
      strange_rest += value - value;
      following = value + gamma * following;
      out[i] = static_cast<float>(following);
    }
  }
  return added(strange) + strange_rest == 0.0;
}

}  // namespace

template <typename T>
void avx2_sum(const T* x, Offsets at, std::int64_t first, std::int64_t last, bool mean,
              float* out) {
  for (std::int64_t s = first; s < last; ++s) {
    const std::int64_t count = at.length(s);
    const double sum = sum_of(x + at.cu[s], count);
    out[s] = static_cast<float>(mean ? sum / static_cast<double>(count) : sum);
  }
}

void avx2_softmax(const float* x, Offsets at, std::int64_t first, std::int64_t last, float* out) {
  for (std::int64_t s = first; s < last; ++s) {
    softmax_of(x + at.cu[s], at.length(s), out + at.cu[s]);
  }
}

void avx2_softmax_gradient(const float* p, const float* g, Offsets at, std::int64_t first,
                           std::int64_t last, float* out) {
  for (std::int64_t s = first; s < last; ++s) {
    const std::int64_t begin = at.cu[s];
    softmax_gradient_of(p + begin, g + begin, at.length(s), out + begin);
  }
}

template <typename T>
bool avx2_scan(const T* x, Offsets at, std::int64_t first, std::int64_t last, double gamma,
               bool forwards, float* out) {
  return forwards ? scan<true>(x, at, first, last, gamma, out)
                  : scan<false>(x, at, first, last, gamma, out);
}

#define AIRL_FAST_INSTANTIATE(T)                                                              \
  template void avx2_sum<T>(const T*, Offsets, std::int64_t, std::int64_t, bool, float*);     \
  template bool avx2_scan<T>(const T*, Offsets, std::int64_t, std::int64_t, double, bool,     \
                             float*);
AIRL_FAST_INSTANTIATE(float)
AIRL_FAST_INSTANTIATE(double)
#undef AIRL_FAST_INSTANTIATE

}  // namespace airl_fast
AIRL_FAST_END_TARGET
#endif
