#include "span_parts.cuh"

namespace airl_fast::gpu {
namespace {

__device__ __forceinline__ double at(const Vector& x, std::int64_t i) {
  return x.data[i * x.stride];
}

__global__ void __launch_bounds__(256) sum_kernel(Vector x, Cuts cu, bool mean, float* out) {
  const Range span = span_of(cu, blockIdx.x);
  double sum = 0.0;
  for (std::int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) sum += at(x, i);
  sum = block_sum(sum);
  if (mean) sum /= static_cast<double>(span.end - span.begin);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(256) last_kernel(Vector x, Cuts cu, float* out) {
  const std::int64_t span = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (span >= cu.count) return;
  const Range range = span_of(cu, span);
  out[span] = range.begin == range.end ? NAN : x.data[(range.end - 1) * x.stride];
}

__device__ __forceinline__ float block_max(float x) {
  auto* warps = reinterpret_cast<float*>(shared_memory());
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned i = 0; i < blockDim.x / 32; ++i) x = fmaxf(x, warps[i]);
  return x;
}

__global__ void __launch_bounds__(256) softmax_kernel(Vector x, Cuts cu, float* out) {
  const Range span = span_of(cu, blockIdx.x);
  const std::int64_t first = span.begin + threadIdx.x;
  float largest = -HUGE_VALF;
  for (std::int64_t i = first; i < span.end; i += blockDim.x) {
    largest = fmaxf(largest, x.data[i * x.stride]);
  }
  const double top = block_max(largest);
  double sum = 0.0;
  for (std::int64_t i = first; i < span.end; i += blockDim.x) sum += exp(at(x, i) - top);
  sum = block_sum(sum);
  for (std::int64_t i = first; i < span.end; i += blockDim.x) {
    out[i] = static_cast<float>(exp(at(x, i) - top) / sum);
  }
}

constexpr int kItems = 8;  // of a lane

__device__ __forceinline__ double power(double base, int exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2, base *= base) {
    if (exponent % 2 == 1) result *= base;
  }
  return result;
}

// A warp a span, 256 values at a time: each lane scans its own 8, the warp the lanes' results.
// With gamma^k for k up to 256 and never its inverse, nothing over- or underflows that should not.
__global__ void __launch_bounds__(32)
    scan_kernel(Vector x, Cuts cu, double gamma, bool forwards, float* out) {
  const Range span = span_of(cu, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x);
  const double reach = power(gamma, kItems), before = power(reach, lane);
  const std::int64_t count = span.end - span.begin;
  double carried = 0.0;
  for (std::int64_t start = 0; start < count; start += 32 * kItems) {
    const std::int64_t mine = start + lane * kItems;
    const auto place = [&](int k) {
      return forwards ? span.begin + mine + k : span.end - 1 - mine - k;
    };
    double y[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const double value = mine + k < count ? at(x, place(k)) : 0.0;
      y[k] = k == 0 ? value : value + gamma * y[k == 0 ? 0 : k - 1];
    }
    double total = y[kItems - 1], weight = reach;
    for (unsigned distance = 1; distance < 32; distance *= 2, weight *= weight) {
      const double lower = __shfl_up_sync(kAllLanes, total, distance);
      if (lane >= static_cast<int>(distance)) total += weight * lower;
    }
    const double lower = __shfl_up_sync(kAllLanes, total, 1u);
    double behind = before * carried + (lane == 0 ? 0.0 : lower);
    carried = __shfl_sync(kAllLanes, total + before * reach * carried, 31);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      behind *= gamma;
      if (mine + k < count) out[place(k)] = static_cast<float>(y[k] + behind);
    }
  }
}

}  // namespace

void segment_sum(const Vector& x, const Cuts& cu, bool mean, float* out, void* stream) {
  launch("segment_sum", sum_kernel, {cu.count, threads_for(cu), kBlockSumBytes, 1}, stream, x, cu,
         mean, out);
}

void segment_last(const Vector& x, const Cuts& cu, float* out, void* stream) {
  launch("segment_last", last_kernel, {(cu.count + 255) / 256, 256, 0, 1}, stream, x, cu, out);
}

void segment_softmax(const Vector& x, const Cuts& cu, float* out, void* stream) {
  launch("segment_softmax", softmax_kernel, {cu.count, threads_for(cu), kBlockSumBytes, 1}, stream,
         x, cu, out);
}

void discounted_scan(const Vector& x, const Cuts& cu, double gamma, bool forwards, float* out,
                     void* stream) {
  launch("discounted_scan", scan_kernel, {cu.count, 32, 0, 1}, stream, x, cu, gamma, forwards,
         out);
}

}  // namespace airl_fast::gpu
