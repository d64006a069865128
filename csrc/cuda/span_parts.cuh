// What the span kernels share: a span's bounds, and sums over a block.
#pragma once

#include "device.h"
#include "spans.h"

namespace airl_fast::gpu {

struct Range {
  std::int64_t begin, end;
};

__device__ __forceinline__ Range span_of(const Cuts& cu, std::int64_t span) {
  const auto clamped = [&](std::int64_t x) { return x < 0 ? 0 : x > cu.total ? cu.total : x; };
  const std::int64_t begin = clamped(cu.offsets[span]), end = clamped(cu.offsets[span + 1]);
  return {begin, end < begin ? begin : end};
}

// Sum over the block, in one order, for every thread. Uses a double per warp of shared memory.
__device__ __forceinline__ double block_sum(double x) {
  auto* warps = reinterpret_cast<double*>(shared_memory());
  const unsigned thread = threadIdx.x;
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  if (blockDim.x == 32) return x;
  __syncthreads();  // what was there may still be read
  if (thread % 32 == 0) warps[thread / 32] = x;
  __syncthreads();
  double sum = 0.0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += warps[i];
  return sum;
}

constexpr std::int64_t kBlockSumBytes = 32 * sizeof(double);

// Threads for a block per span: a warp, or more where spans are long.
inline int threads_for(const Cuts& cu) {
  return cu.total <= 256 * cu.count ? 32 : 256;
}

}  // namespace airl_fast::gpu
