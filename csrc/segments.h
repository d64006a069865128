// Kernels over spans: `cu` holds S + 1 offsets into N values (CSR), checked by the caller.
//
// A span is worked on by one thread, in an order that its length alone decides: no result depends
// on the number of threads.
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

struct Offsets {
  const std::int32_t* cu;  // [S + 1]
  std::int64_t spans;      // S
  std::int64_t total() const { return cu[spans]; }
  std::int64_t length(std::int64_t s) const { return std::int64_t{cu[s + 1]} - cu[s]; }
};

// Values from which a second thread is worth waking.
constexpr std::int64_t kSharedValues = 1 << 16;

// Whether cu runs from 0 to total, strictly increasing.
bool partitions(Offsets at, std::int64_t total);

// out [S]; sums are kept in double, so that a long span loses nothing to float32.
template <typename T>
void segment_sum(View<T> x, Offsets at, bool mean, int threads, float* out);

// out [S]
template <typename T>
void segment_last(View<T> x, Offsets at, int threads, float* out);

// out [N]
template <typename T>
void segment_softmax(View<T> x, Offsets at, int threads, float* out);

// out [N]. Backwards in time: out[i] = x[i] + gamma * out[i + 1] within a span (the returns);
// forwards: out[i] = x[i] + gamma * out[i - 1] (its adjoint). Whether every x was finite.
template <typename T>
bool discounted_scan(View<T> x, Offsets at, double gamma, bool forwards, int threads, float* out);

// Gradients, given those at the results, g. Of sum and mean, g [S]: out[i] = g[s] (over the length
// of span s).
void segment_spread(View<float> g, Offsets at, bool mean, int threads, float* out);

// Of the softmax p [N], g [N]: out[i] = p[i] (g[i] - sum over the span of p g).
void segment_softmax_gradient(const float* p, View<float> g, Offsets at, int threads, float* out);

}  // namespace airl_fast
