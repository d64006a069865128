// The kernel of row_attention.h, written once over a vector type, as those of rows_kernels.h, which
// includes this.
#pragma once

#include <cstdint>

#include "layer_kernels.h"

namespace airl_fast {

// Keys [size, count], `stride` floats from one number of a key to the next, and values [count, size].
struct KeyPart {
  const float* keys;
  std::int64_t stride;
  const float* values;
  std::int64_t count;
};

// One query [size] over two parts; scores has room for all of their keys.
using AttendQuery = void (*)(std::int64_t size, const float* query, const KeyPart* parts,
                             float scale, float* scores, float* out);

namespace {

template <class V>
inline float largest_of(const float* z, std::int64_t count);

// Scores of kVectors vectors of keys.
template <class V, int kVectors>
inline void score_keys(std::int64_t size, const float* query, const float* keys,
                       std::int64_t stride, typename V::F scale, float* scores) {
  typename V::F sums[kVectors];
  for (auto& sum : sums) sum = V::set(0.0f);
  for (std::int64_t e = 0; e < size; ++e, keys += stride) {
    const auto q = V::set(query[e]);
    for (int k = 0; k < kVectors; ++k) sums[k] = V::fma(q, V::load(keys + k * V::kWidth), sums[k]);
  }
  for (int k = 0; k < kVectors; ++k) V::store(scores + k * V::kWidth, V::mul(sums[k], scale));
}

template <class V>
inline void score_part(std::int64_t size, const float* query, const KeyPart& part,
                       typename V::F scale, float* scores) {
  std::int64_t j = 0;
  for (; j + 4 * V::kWidth <= part.count; j += 4 * V::kWidth) {
    score_keys<V, 4>(size, query, part.keys + j, part.stride, scale, scores + j);
  }
  for (; j + V::kWidth <= part.count; j += V::kWidth) {
    score_keys<V, 1>(size, query, part.keys + j, part.stride, scale, scores + j);
  }
  if (j == part.count) return;
  const std::int64_t left = part.count - j;
  auto sum = V::set(0.0f);
  for (std::int64_t e = 0; e < size; ++e) {
    sum = V::fma(V::set(query[e]), load_first<V>(part.keys + e * part.stride + j, left), sum);
  }
  store_first<V>(scores + j, V::mul(sum, scale), left);
}

// scores become exp(score - largest); returns their sum.
template <class V>
inline float softmax_in_place(float* scores, std::int64_t count) {
  const auto top = V::set(largest_of<V>(scores, count));
  auto sum = V::set(0.0f);
  each_vector<V>(count, [&](auto load, auto store) {
    store(scores, exponential<V>(V::sub(load(scores), top)));
  });
  std::int64_t j = 0;
  for (; j + V::kWidth <= count; j += V::kWidth) sum = V::add(sum, V::load(scores + j));
  float total = V::sum(sum);
  for (; j < count; ++j) total += scores[j];
  return total;
}

// Adds weights times values, of kVectors vectors of each value, times `by`.
template <class V, int kVectors>
inline void weigh_values(std::int64_t size, const float* weights, const KeyPart* parts,
                         std::int64_t first, typename V::F by, float* out) {
  typename V::F sums[kVectors];
  for (auto& sum : sums) sum = V::set(0.0f);
  for (int p = 0; p < 2; weights += parts[p].count, ++p) {
    const float* value = parts[p].values + first;
    for (std::int64_t j = 0; j < parts[p].count; ++j, value += size) {
      const auto w = V::set(weights[j]);
      for (int k = 0; k < kVectors; ++k) {
        sums[k] = V::fma(w, V::load(value + k * V::kWidth), sums[k]);
      }
    }
  }
  for (int k = 0; k < kVectors; ++k) V::store(out + first + k * V::kWidth, V::mul(sums[k], by));
}

template <class V>
void attend_query(std::int64_t size, const float* query, const KeyPart* parts, float scale,
                  float* scores, float* out) {
  score_part<V>(size, query, parts[0], V::set(scale), scores);
  score_part<V>(size, query, parts[1], V::set(scale), scores + parts[0].count);
  const float sum = softmax_in_place<V>(scores, parts[0].count + parts[1].count);
  const auto by = V::set(1.0f / sum);
  std::int64_t e = 0;
  for (; e + 4 * V::kWidth <= size; e += 4 * V::kWidth) {
    weigh_values<V, 4>(size, scores, parts, e, by, out);
  }
  for (; e + V::kWidth <= size; e += V::kWidth) {
    weigh_values<V, 1>(size, scores, parts, e, by, out);
  }
  if (e == size) return;
  const std::int64_t left = size - e;
  auto sums = V::set(0.0f);
  const float* weight = scores;
  for (int p = 0; p < 2; ++p) {
    for (std::int64_t j = 0; j < parts[p].count; ++j, ++weight) {
      sums = V::fma(V::set(*weight), load_first<V>(parts[p].values + j * size + e, left), sums);
    }
  }
  store_first<V>(out + e, V::mul(sums, by), left);
}

}  // namespace
}  // namespace airl_fast
