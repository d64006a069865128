#include <algorithm>
#include <type_traits>

#include "row_blocks.cuh"

namespace airl_fast::gpu {
namespace {

template <class T, bool kShaped>
__global__ void __launch_bounds__(512) read_kernel(Chunk chunk, Head head,
                                                   const std::int64_t* targets, RowStats* stats, float* logp,
                                                   float* entropy) {
  const std::int64_t at = blockIdx.x / static_cast<unsigned>(cluster_size());
  const bool leads = threadIdx.x == 0 && cluster_rank() == 0;
  const Row<T> row(chunk, at);
  const float z = leads ? target_z<T, kShaped>(row, head, targets[at]) : 0.0f;
  const int threads = static_cast<int>(blockDim.x);
  const int share = cluster_rank() * threads + static_cast<int>(threadIdx.x);
  float edge;
  const Partial part = merged_in_cluster(
      read_share<T, kShaped>(row, head, share, threads * cluster_size(), nullptr, 0, 0, &edge));
  cluster_arrive();
  if (leads) {
    const RowStats found = {part.largest, part.sum, part.gap, z};
    if (logp != nullptr) logp[at] = logp_of(found);
    if (entropy != nullptr) entropy[at] = entropy_of(found);
    if (stats != nullptr) stats[at] = found;
  }
  cluster_wait();
}

}  // namespace

// Without gradients nothing waits for the whole row, so blocks share one only where rows alone
// would leave processors idle: 4 blocks of 512 threads fill one.
Plan plan_read(const Chunk& chunk, const Device& device) {
  const std::int64_t bytes = chunk.vocab * size_of(chunk.element);
  const int threads = bytes >= 64 * 1024 ? 512 : bytes >= 16 * 1024 ? 256 : 128;
  int cluster = 1;
  while (device.major >= 9 && cluster < 8 && bytes / cluster >= 64 * 1024 &&
         chunk.rows * cluster < 4 * std::int64_t{device.processors}) {
    cluster *= 2;
  }
  return {cluster, threads, 0};
}

void read_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets, const Plan& plan,
               RowStats* stats, float* logp, float* entropy, void* stream) {
  check_chunk(chunk);
  for_each_element(chunk.element, [&](auto element) {
    using T = decltype(element);
    launch("read_rows", is_shaped(head) ? read_kernel<T, true> : read_kernel<T, false>,
           {chunk.rows * plan.cluster, plan.threads, sizeof(BlockMemory), plan.cluster}, stream,
           chunk, head, targets, stats, logp, entropy);
  });
}

}  // namespace airl_fast::gpu
