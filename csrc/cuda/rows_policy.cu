#include <algorithm>
#include <type_traits>

#include "row_blocks.cuh"

namespace airl_fast::gpu {
namespace {

// d (share * loss) / d logp, as in airl_fast/ops/_policy_terms.py, which has the reasons.
__device__ float d_logp_of(float logp, std::int64_t at, const PolicyRows& actions,
                           const PolicyOptions& options) {
  const float a = actions.advantages[at], share = actions.share[at];
  const float rho = actions.old_logp == nullptr ? 1.0f : expf(logp - actions.old_logp[at]);
  const float low = 1.0f - options.clip_low, high = 1.0f + options.clip_high;
  const float bounded = fminf(fmaxf(rho, low), high) * a;
  const float unclipped = fminf(rho, options.delta) * a;
  const bool is_open =
      unclipped <= bounded ? rho <= options.delta : rho >= low && rho <= high;
  float d = is_open ? -a * rho * share : 0.0f;
  if (actions.ref_logp != nullptr && options.beta != 0.0f) {
    d -= options.beta * expm1f(actions.ref_logp[at] - logp) * share;
  }
  return logp == logp ? d : logp;
}

template <class T, class U, bool kShaped>
__global__ void __launch_bounds__(kMaxThreads, 1)
    policy_kernel(Chunk chunk, Head head, const std::int64_t* targets, int kept_rounds,
                  PolicyRows actions, PolicyOptions options, float* logp, float* entropy) {
  const std::int64_t at = blockIdx.x / static_cast<unsigned>(cluster_size());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int share = cluster_rank() * threads + thread, sharers = threads * cluster_size();
  const std::int64_t target = targets[at];
  const Row<T> row(chunk, at);
  auto* memory = reinterpret_cast<BlockMemory*>(shared_memory());
  unsigned char* kept = shared_memory() + sizeof(BlockMemory) + 16 * thread;
  const float z = thread == 0 ? target_z<T, kShaped>(row, head, target) : 0.0f;
  float edge = 0.0f;
  const Partial part = merged_in_cluster(
      read_share<T, kShaped>(row, head, share, sharers, kept, 16 * threads, kept_rounds, &edge));
  if (thread == 0) {
    const RowStats stats = {part.largest, part.sum, part.gap, z};
    const float found = logp_of(stats);
    memory->coefficients =
        coefficients_of(stats, head, target, row.vocab, d_logp_of(found, at, actions, options),
                        -options.entropy_coef * actions.share[at]);
    if (cluster_rank() == 0) {
      logp[at] = found;
      entropy[at] = entropy_of(stats);
    }
  }
  cluster_arrive();
  __syncthreads();
  const Coefficients c = memory->coefficients;
  const int kept_vectors = kept_rounds * sharers;
  for (int round = 0, vector = share; round < kept_rounds && vector < row.vectors;
       ++round, vector += sharers) {
    write_vector<T, U, kShaped>(row, vector, load16(kept + round * 16 * threads), head, c);
  }
  cluster_wait();  // after it no block reads another's memory, which may now go
  write_vectors<T, U, kShaped>(row, head, c, kept_vectors, row.vectors, share, sharers);
  write_edge<T, U, kShaped>(row, head, c, share, edge);
}

constexpr std::int64_t kMemory = sizeof(BlockMemory);
constexpr std::int64_t kReserved = 1024;  // of a block's shared memory, by CUDA

}  // namespace

// Three blocks of 256 threads a processor, so that one waits for memory while others compute; on
// Hopper as many blocks to a row as make it fit, up to 8. A row that does not fit even so takes
// all that one block can have: the fewer rows are under way, the more of the rest stays in L2.
Plan plan_policy(const Chunk& chunk, const Device& device) {
  const std::int64_t bytes = chunk.vocab * size_of(chunk.element);
  const auto kept = [&](int cluster, int threads) {  // whole rounds of all threads
    const std::int64_t round = 16 * threads;
    return (bytes / cluster + round) / round * round;
  };
  const std::int64_t third = device.shared_bytes / 3 - kReserved - kMemory;
  const int most = device.major >= 9 ? 8 : 1;
  int cluster = 1;
  while (cluster < most && kept(cluster, 256) > third) cluster *= 2;
  if (kept(cluster, 256) <= third) return {cluster, 256, kept(cluster, 256)};
  const std::int64_t half = device.shared_bytes / 2 - kReserved - kMemory;
  if (kept(cluster, 512) <= half) return {cluster, 512, kept(cluster, 512)};
  const std::int64_t round = 16 * 1024, whole = (device.shared_bytes - kMemory) / round * round;
  return {cluster, 1024, std::min(kept(cluster, 1024), whole)};
}

void policy_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets, const Plan& plan,
                 const PolicyRows& actions, const PolicyOptions& options, float* logp,
                 float* entropy, Element gradient, void* stream) {
  check_chunk(chunk);
  const auto kept_rounds = static_cast<int>(plan.kept_bytes / (16 * plan.threads));
  for_each_kind(chunk, gradient, head, [&](auto logit, auto result, auto is_shaped) {
    launch("policy_rows",
           policy_kernel<decltype(logit), decltype(result), decltype(is_shaped)::value>,
           {chunk.rows * plan.cluster, plan.threads, kMemory + plan.kept_bytes, plan.cluster},
           stream, chunk, head, targets, kept_rounds, actions, options, logp, entropy);
  });
}

}  // namespace airl_fast::gpu
