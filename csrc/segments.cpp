#include "segments.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace airl_fast {

template <typename T>
void segment_sum(View<T> x, const std::int32_t* cu, std::int64_t spans, bool mean, float* out) {
  for (std::int64_t s = 0; s < spans; ++s) {
    double sum = 0.0;
    for (std::int64_t i = cu[s]; i < cu[s + 1]; ++i) sum += x[i];
    out[s] = static_cast<float>(mean ? sum / (cu[s + 1] - cu[s]) : sum);
  }
}

template <typename T>
void segment_last(View<T> x, const std::int32_t* cu, std::int64_t spans, float* out) {
  for (std::int64_t s = 0; s < spans; ++s) out[s] = static_cast<float>(x[cu[s + 1] - 1]);
}

template <typename T>
void segment_softmax(View<T> x, const std::int32_t* cu, std::int64_t spans, float* out) {
  for (std::int64_t s = 0; s < spans; ++s) {
    const std::int64_t begin = cu[s], end = cu[s + 1];
    double largest = -std::numeric_limits<double>::infinity();
    for (std::int64_t i = begin; i < end; ++i) largest = std::max(largest, x[i]);
    double sum = 0.0;
    for (std::int64_t i = begin; i < end; ++i) sum += std::exp(x[i] - largest);
    for (std::int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<float>(std::exp(x[i] - largest) / sum);
    }
  }
}

template <typename T>
void discounted_scan(View<T> x, const std::int32_t* cu, std::int64_t spans, double gamma,
                     bool forwards, float* out) {
  for (std::int64_t s = 0; s < spans; ++s) {
    const std::int64_t begin = cu[s], end = cu[s + 1];
    double carried = 0.0;
    for (std::int64_t k = 0; k < end - begin; ++k) {
      const std::int64_t i = forwards ? begin + k : end - 1 - k;
      carried = x[i] + gamma * carried;
      out[i] = static_cast<float>(carried);
    }
  }
}

#define AIRL_FAST_INSTANTIATE(T)                                                              \
  template void segment_sum<T>(View<T>, const std::int32_t*, std::int64_t, bool, float*);     \
  template void segment_last<T>(View<T>, const std::int32_t*, std::int64_t, float*);          \
  template void segment_softmax<T>(View<T>, const std::int32_t*, std::int64_t, float*);       \
  template void discounted_scan<T>(View<T>, const std::int32_t*, std::int64_t, double, bool,  \
                                   float*);
AIRL_FAST_INSTANTIATE(float)
AIRL_FAST_INSTANTIATE(double)
#undef AIRL_FAST_INSTANTIATE

}  // namespace airl_fast
