// The span kernels for AVX2 and FMA, over contiguous values: spans [first, last) of `at`.
// Processors with AVX-512 run them too: they wait for memory, or for the next span.
#pragma once

#include <cstdint>

#include "segments.h"

namespace airl_fast {

template <typename T>
void avx2_sum(const T* x, Offsets at, std::int64_t first, std::int64_t last, bool mean, float* out);

void avx2_softmax(const float* x, Offsets at, std::int64_t first, std::int64_t last, float* out);

void avx2_softmax_gradient(const float* p, const float* g, Offsets at, std::int64_t first,
                           std::int64_t last, float* out);

// Whether every x was finite.
template <typename T>
bool avx2_scan(const T* x, Offsets at, std::int64_t first, std::int64_t last, double gamma,
               bool forwards, float* out);

}  // namespace airl_fast
