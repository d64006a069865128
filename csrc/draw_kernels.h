// The kernel of draw.h, written once over a vector type, as those of rows_kernels.h, which includes
// this.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "layer_kernels.h"

namespace airl_fast {

// One row; sums has room for a number per kDrawBlock tokens, or part of them.
using Draw = std::int64_t (*)(const float* logits, std::int64_t vocab, float scale, double u,
                              double* sums, float* logp);

constexpr std::int64_t kDrawBlock = 512;

namespace {

template <class V>
inline float largest_of(const float* z, std::int64_t count);

// Writes exp(scale z - top) of up to kDrawBlock logits; returns their sum.
template <class V>
inline double weights_of(const float* z, std::int64_t count, typename V::F scale,
                         typename V::F top, float* weights) {
  each_vector<V>(count, [&](auto load, auto store) {
    store(weights, exponential<V>(V::sub(V::mul(load(z), scale), top)));
  });
  auto sum = V::set(0.0f);
  std::int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) sum = V::add(sum, V::load(weights + i));
  double total = V::sum(sum);
  for (; i < count; ++i) total += weights[i];
  return total;
}

template <class V>
std::int64_t draw(const float* logits, std::int64_t vocab, float scale, double u, double* sums,
                  float* logp) {
  const float largest = largest_of<V>(logits, vocab) * scale;
  const auto by = V::set(scale), top = V::set(largest);
  float weights[kDrawBlock];
  double total = 0.0;
  for (std::int64_t start = 0, b = 0; start < vocab; start += kDrawBlock, ++b) {
    const std::int64_t count = std::min(kDrawBlock, vocab - start);
    sums[b] = weights_of<V>(logits + start, count, by, top, weights);
    total += sums[b];
  }
  *logp = std::numeric_limits<float>::quiet_NaN();
  if (!std::isfinite(total) || !std::isfinite(largest)) return 0;

  // The block that passes, or the last that holds anything, then the token in the same way.
  double left = u * total;
  std::int64_t block = 0;
  for (std::int64_t b = 0; b * kDrawBlock < vocab; ++b) {
    if (sums[b] == 0.0) continue;
    block = b;
    if (left < sums[b]) break;
    left -= sums[b];
  }
  const std::int64_t start = block * kDrawBlock, count = std::min(kDrawBlock, vocab - start);
  weights_of<V>(logits + start, count, by, top, weights);
  std::int64_t token = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (weights[i] == 0.0f) continue;
    token = i;
    if (left < weights[i]) break;
    left -= weights[i];
  }
  token += start;
  *logp = static_cast<float>(double{logits[token] * scale} - largest - std::log(total));
  return token;
}

}  // namespace
}  // namespace airl_fast
