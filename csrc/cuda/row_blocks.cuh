// How the threads of a block, and the blocks of a cluster, share a row and agree on its statistics.
#pragma once

#include "row_parts.cuh"

namespace airl_fast::gpu {

// The start of each block's shared memory; the kept part of the row follows.
struct alignas(16) BlockMemory {
  Partial warps[kMaxThreads / 32];
  Coefficients coefficients;
};

// Merges the partials of all threads of all blocks of the cluster, in one order. The result is
// that of the threads of warp 0. After it come cluster_arrive and, before a block ends, and with
// it its shared memory, cluster_wait.
__device__ __forceinline__ Partial merged_in_cluster(Partial part) {
  auto* memory = reinterpret_cast<BlockMemory*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int mask = 16; mask > 0; mask /= 2) {
    part = merged(part, {__shfl_xor_sync(kAllLanes, part.largest, mask),
                         __shfl_xor_sync(kAllLanes, part.sum, mask),
                         __shfl_xor_sync(kAllLanes, part.gap, mask)});
  }
  if (lane == 0) memory->warps[thread / 32] = part;
  cluster_barrier();
  if (thread >= 32) return part;
  const int warps = static_cast<int>(blockDim.x) / 32;
  part = {kNone, 0.0f, 0.0f};
  for (int i = lane; i < warps * cluster_size(); i += 32) {
    part = merged(part, in_block(memory->warps, i / warps)[i % warps]);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    part = merged(part, {__shfl_xor_sync(kAllLanes, part.largest, mask),
                         __shfl_xor_sync(kAllLanes, part.sum, mask),
                         __shfl_xor_sync(kAllLanes, part.gap, mask)});
  }
  return part;
}

template <class Run>
void for_each_element(Element element, Run run) {
  switch (element) {
    case Element::kFloat32: return run(float{});
    case Element::kBFloat16: return run(BFloat16{});
    case Element::kFloat16: return run(Float16{});
  }
}

// Whether the head has more to it than a scale.
inline bool is_shaped(const Head& head) { return head.bias != nullptr || head.outer != 0.0f; }

// Calls run(T{}, U{}, is shaped): the elements of the logits and of their gradient, which has
// either theirs, or half precision where they are float32.
template <class Run>
void for_each_kind(const Chunk& chunk, Element gradient, const Head& head, Run run) {
  const auto of = [&](auto logit, auto result) {
    is_shaped(head) ? run(logit, result, std::true_type{}) : run(logit, result, std::false_type{});
  };
  if (gradient == chunk.element) {
    return for_each_element(gradient, [&](auto element) { of(element, element); });
  }
  if (chunk.element != Element::kFloat32) {
    throw std::invalid_argument("the gradient of half-precision logits has their own dtype");
  }
  if (reinterpret_cast<std::uintptr_t>(chunk.logits) % 16 != 0 || chunk.row_stride % 4 != 0) {
    throw std::invalid_argument(
        "a gradient narrower than the logits needs rows that start on multiples of 16 bytes");
  }
  gradient == Element::kBFloat16 ? of(float{}, BFloat16{}) : of(float{}, Float16{});
}

inline std::int64_t size_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Refuses what the kernels' 32-bit columns, and a grid, do not reach.
inline void check_chunk(const Chunk& chunk) {
  if (chunk.vocab < 1 || chunk.vocab > (1 << 30) || chunk.rows < 0 || chunk.rows > (1 << 27)) {
    throw std::invalid_argument("a chunk of " + std::to_string(chunk.rows) + " x " +
                                std::to_string(chunk.vocab) +
                                " logits: expected at most 2^27 rows of 1 to 2^30; use chunks of "
                                "fewer rows");
  }
}

}  // namespace airl_fast::gpu
