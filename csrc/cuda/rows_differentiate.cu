#include <algorithm>
#include <type_traits>

#include "row_blocks.cuh"

namespace airl_fast::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kSlice = 8 * kThreads;  // vectors of a block: 32 KiB

// A block takes `slice` vectors of a row; the statistics are those of the whole row.
template <class T, class U, bool kShaped>
__global__ void __launch_bounds__(kThreads, 4)
    differentiate_kernel(Chunk chunk, Head head, const std::int64_t* targets, int slices,
                         int slice, const RowStats* stats, const float* d_logp,
                         const float* d_entropy) {
  const std::int64_t at = blockIdx.x / static_cast<unsigned>(slices);
  const int place = static_cast<int>(blockIdx.x % static_cast<unsigned>(slices));
  const int thread = static_cast<int>(threadIdx.x);
  const Row<T> row(chunk, at);
  const bool has_edge = place == 0 && thread < row.edges();
  const float edge = has_edge ? to_float(row.data[row.edge(thread)]) : 0.0f;
  auto* shared = reinterpret_cast<Coefficients*>(shared_memory());
  if (thread == 0) {
    *shared = coefficients_of(stats[at], head, targets[at], row.vocab, d_logp ? d_logp[at] : 0.0f,
                              d_entropy ? d_entropy[at] : 0.0f);
  }
  __syncthreads();
  const Coefficients c = *shared;
  const int end = min(row.vectors, (place + 1) * slice);
  write_vectors<T, U, kShaped>(row, head, c, place * slice, end, thread, kThreads);
  if (has_edge) write_edge<T, U, kShaped>(row, head, c, thread, edge);
}

}  // namespace

void differentiate_rows(const Chunk& chunk, const Head& head, const std::int64_t* targets,
                        const RowStats* stats, const float* d_logp, const float* d_entropy,
                        Element gradient, void* stream) {
  check_chunk(chunk);
  const std::int64_t vectors = chunk.vocab * size_of(chunk.element) / 16;
  // A narrower gradient overwrites logits of other columns: then one block does it all, in order.
  const std::int64_t slice =
      gradient == chunk.element ? kSlice : std::max<std::int64_t>(1, vectors);
  const std::int64_t slices = std::max<std::int64_t>(1, (vectors + slice - 1) / slice);
  if (chunk.rows * slices > 0x7fffffff) {
    throw std::invalid_argument("more than 2^31 blocks: use chunks of fewer rows");
  }
  for_each_kind(chunk, gradient, head, [&](auto logit, auto result, auto is_shaped) {
    launch("differentiate_rows",
           differentiate_kernel<decltype(logit), decltype(result), decltype(is_shaped)::value>,
           {chunk.rows * slices, kThreads, sizeof(Coefficients), 1}, stream, chunk, head, targets,
           static_cast<int>(slices), static_cast<int>(slice), stats, d_logp, d_entropy);
  });
}

}  // namespace airl_fast::gpu
