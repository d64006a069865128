// Kernels over spans: `cu` holds S + 1 offsets into N values (CSR), checked by the caller.
#pragma once

#include <cstdint>

namespace airl_fast {

// A one-dimensional view: element i lies at data[i * stride] (stride in elements; 0 if expanded).
template <typename T>
struct View {
  const T* data;
  std::int64_t stride;
  double operator[](std::int64_t i) const { return static_cast<double>(data[i * stride]); }
};

// out [S]; sums are kept in double, so that a long span loses nothing to float32.
template <typename T>
void segment_sum(View<T> x, const std::int32_t* cu, std::int64_t spans, bool mean, float* out);

// out [S]
template <typename T>
void segment_last(View<T> x, const std::int32_t* cu, std::int64_t spans, float* out);

// out [N]
template <typename T>
void segment_softmax(View<T> x, const std::int32_t* cu, std::int64_t spans, float* out);

// out [N]. Backwards in time: out[i] = x[i] + gamma * out[i + 1] within a span (the returns);
// forwards: out[i] = x[i] + gamma * out[i - 1] (its adjoint).
template <typename T>
void discounted_scan(View<T> x, const std::int32_t* cu, std::int64_t spans, double gamma,
                     bool forwards, float* out);

}  // namespace airl_fast
