#include <algorithm>

#include "span_parts.cuh"

namespace airl_fast::gpu {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 128;

// Sums over the spans of one class; those of the policy come before those of experts.
enum Sum { kCount, kWeight, kRight, kD, kF, kLogit, kEntropy, kLoss, kSums };

std::int64_t blocks_for(std::int64_t spans) {
  return std::max<std::int64_t>(1, std::min((spans + kThreads - 1) / kThreads, kMaxBlocks));
}

__device__ __forceinline__ double logit_expert_is_high(const Spans& spans,
                                                       const DiscriminatorOptions& options,
                                                       std::int64_t i) {
  const double f = spans.f.data[i * spans.f.stride];
  const double logp = options.subtract_logp ? spans.logp.data[i * spans.logp.stride] : 0.0;
  return (f - logp) / options.temperature;
}

__device__ __forceinline__ double weight_of(const Spans& spans, std::int64_t i) {
  return spans.weight.data == nullptr ? 1.0 : spans.weight.data[i * spans.weight.stride];
}

__device__ __forceinline__ double smoothed_target(bool expert,
                                                  const DiscriminatorOptions& options) {
  return (expert ? 1.0 - options.label_smoothing : 0.0) + options.label_smoothing / 2;
}

__device__ __forceinline__ double over(double sum, double total) {
  return total > 0 ? sum / total : 0.0;
}

// Each block's sums of both classes, partials [blocks, 2, kSums].
__global__ void __launch_bounds__(kThreads)
    sums_kernel(Spans spans, DiscriminatorOptions options, double* partials) {
  double sums[2][kSums] = {};
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < spans.count;
       i += std::int64_t{gridDim.x} * kThreads) {
    const bool expert = spans.is_expert[i * spans.expert_stride] != 0;
    const double x = logit_expert_is_high(spans, options, i), w = weight_of(spans, i);
    // exp of a number of at most 0 cannot overflow: softplus(x) = max(x, 0) + log(1 + e).
    const double e = exp(-fabs(x)), softplus = fmax(x, 0.0) + log1p(e);
    const double d = (x >= 0 ? 1.0 : e) / (1.0 + e), y = smoothed_target(expert, options);
    // -y log D - (1 - y) log(1 - D), with log D = x - softplus(x); "wgan": f itself.
    const double loss = options.critic ? x : y * (softplus - x) + (1 - y) * softplus;
    const double f = spans.f.data[i * spans.f.stride];
    const double found[kSums] = {1, w, (x > 0) == expert ? 1.0 : 0.0, d, f, x,
                                 softplus - x * d, w * loss};
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      sums[0][k] += expert ? 0.0 : found[k];
      sums[1][k] += expert ? found[k] : 0.0;
    }
  }
#pragma unroll
  for (int k = 0; k < 2 * kSums; ++k) {
    const double sum = block_sum(sums[k / kSums][k % kSums]);
    if (threadIdx.x == 0) partials[std::int64_t{blockIdx.x} * 2 * kSums + k] = sum;
  }
}

// Each of the first 2 kSums threads adds up its number over the blocks.
__device__ __forceinline__ double total_of(const double* partials, int blocks) {
  double sum = 0.0;
  if (threadIdx.x < 2 * kSums) {
    for (int i = 0; i < blocks; ++i) sum += partials[std::int64_t{i} * 2 * kSums + threadIdx.x];
  }
  return sum;
}

__global__ void __launch_bounds__(32)
    loss_kernel(DiscriminatorOptions options, const double* partials, int blocks, double* out) {
  const double mine = total_of(partials, blocks);
  double sums[2][kSums];
#pragma unroll
  for (int k = 0; k < 2 * kSums; ++k) {
    sums[k / kSums][k % kSums] = __shfl_sync(kAllLanes, mine, k);
  }
  if (threadIdx.x != 0) return;
  const double *policy = sums[0], *expert = sums[1];
  const double count = policy[kCount] + expert[kCount];
  out[0] = options.critic
               ? over(policy[kLoss], policy[kWeight]) - over(expert[kLoss], expert[kWeight])
               : over(policy[kLoss] + expert[kLoss], policy[kWeight] + expert[kWeight]);
  out[1] = (policy[kRight] + expert[kRight]) / count;  // 0 / 0, the mean of nothing, is NaN
  out[2] = expert[kRight] / expert[kCount];
  out[3] = policy[kRight] / policy[kCount];
  out[4] = expert[kD] / expert[kCount];
  out[5] = policy[kD] / policy[kCount];
  out[6] = (policy[kEntropy] + expert[kEntropy]) / count;
  out[7] = expert[kF] / expert[kCount];
  out[8] = policy[kF] / policy[kCount];
  out[9] = expert[kLogit] / expert[kCount];
  out[10] = policy[kLogit] / policy[kCount];
}

__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Spans spans, DiscriminatorOptions options, const double* grad,
                    const double* partials, int blocks, double* out) {
  auto* totals = reinterpret_cast<double*>(shared_memory());
  const double mine = total_of(partials, blocks);
  if (threadIdx.x < 2 * kSums) totals[threadIdx.x] = mine;
  __syncthreads();
  const double policy = totals[kWeight], experts = totals[kSums + kWeight];
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= spans.count) return;
  const bool expert = spans.is_expert[i * spans.expert_stride] != 0;
  const double w = *grad * weight_of(spans, i);
  if (options.critic) {
    out[i] = over(expert ? -w : w, expert ? experts : policy);
    return;
  }
  const double x = logit_expert_is_high(spans, options, i), e = exp(-fabs(x));
  const double d = (x >= 0 ? 1.0 : e) / (1.0 + e);
  out[i] = over(w, policy + experts) * (d - smoothed_target(expert, options)) / options.temperature;
}

void sum_up(const Spans& spans, const DiscriminatorOptions& options, double* scratch,
            void* stream) {
  launch("discriminator_sums", sums_kernel,
         {blocks_for(spans.count), kThreads, kBlockSumBytes, 1}, stream, spans, options, scratch);
}

}  // namespace

std::int64_t discriminator_scratch(std::int64_t spans) { return blocks_for(spans) * 2 * kSums; }

void discriminator_loss(const Spans& spans, const DiscriminatorOptions& options, double* scratch,
                        double* out, void* stream) {
  sum_up(spans, options, scratch, stream);
  launch("discriminator_loss", loss_kernel, {1, 32, 0, 1}, stream, options,
         static_cast<const double*>(scratch), static_cast<int>(blocks_for(spans.count)), out);
}

void discriminator_gradient(const Spans& spans, const DiscriminatorOptions& options,
                            const double* grad, double* scratch, double* out, void* stream) {
  sum_up(spans, options, scratch, stream);
  launch("discriminator_gradient", gradient_kernel,
         {(spans.count + kThreads - 1) / kThreads, kThreads, 2 * kSums * sizeof(double), 1},
         stream, spans, options, grad, static_cast<const double*>(scratch),
         static_cast<int>(blocks_for(spans.count)), out);
}

}  // namespace airl_fast::gpu
