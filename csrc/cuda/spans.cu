#include "row_blocks.cuh"
#include "span_parts.cuh"

namespace airl_fast::gpu {
namespace {

// Whether an offset of `cuts` is `value`.
__device__ bool is_cut(const Cuts& cuts, std::int64_t value) {
  std::int64_t low = 0, high = cuts.count;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (cuts.offsets[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return cuts.offsets[low] == value;
}

// This thread's part of the dot products of a row with one row of the weight, or with both.
template <class T>
__device__ __forceinline__ void add_products(const Row<T>& row, const float* w0, const float* w1,
                                             float* sum0, float* sum1) {
  const auto add = [&](float x, int at) {
    *sum0 = fmaf(x, w0[at], *sum0);
    if (w1 != nullptr) *sum1 = fmaf(x, w1[at], *sum1);
  };
  const int thread = static_cast<int>(threadIdx.x);
  for (int vector = thread; vector < row.vectors; vector += static_cast<int>(blockDim.x)) {
    float x[kWidth<T>];
    unpack<T>(load16(row.at(vector)), x);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) add(x[k], row.first_of(vector) + k);
  }
  if (thread < row.edges()) add(to_float(row.data[row.edge(thread)]), row.edge(thread));
}

template <class T>
__global__ void __launch_bounds__(128)
    score_kernel(ScoreHead head, Cuts cu, Cuts sequences, const float* logp, bool mean, float* f,
                 float* reward) {
  const std::int64_t at = blockIdx.x;
  const Range span = span_of(cu, at);
  const bool shaped = head.rows == 2, is_empty = span.begin == span.end;
  const float* potential = shaped ? head.weight + head.hidden.vocab : nullptr;
  float g = 0.0f, after = 0.0f, before = 0.0f;
  if (!is_empty) {
    add_products(Row<T>(head.hidden, span.end - 1), head.weight, potential, &g, &after);
  }
  const bool follows = shaped && span.begin > 0 && !is_cut(sequences, at);
  if (follows) {
    add_products<T>(Row<T>(head.hidden, span.begin - 1), potential, nullptr, &before, nullptr);
  }
  double sum = 0.0;
  if (logp != nullptr) {
    for (std::int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) sum += logp[i];
    sum = block_sum(sum);
    if (mean) sum /= static_cast<double>(span.end - span.begin);
  }
  double found = block_sum(g) + (head.bias == nullptr ? 0.0 : head.bias[0]);
  if (shaped) {  // for the whole block
    const double bias = head.bias == nullptr ? 0.0 : head.bias[1];
    const double here = block_sum(after) + bias, there = block_sum(before) + bias;
    found += (is_cut(sequences, at + 1) ? 0.0 : head.gamma * here) - (follows ? there : 0.0);
  }
  if (threadIdx.x != 0) return;
  f[at] = is_empty ? NAN : static_cast<float>(found);
  reward[at] = is_empty ? NAN : static_cast<float>(found - sum);
}

}  // namespace

void score_spans(const ScoreHead& head, const Cuts& cu, const Cuts& sequences, const float* logp,
                 bool mean, float* f, float* reward, void* stream) {
  check_chunk(head.hidden);
  for_each_element(head.hidden.element, [&](auto element) {
    launch("score_spans", score_kernel<decltype(element)>, {cu.count, 128, kBlockSumBytes, 1},
           stream, head, cu, sequences, logp, mean, f, reward);
  });
}

}  // namespace airl_fast::gpu
