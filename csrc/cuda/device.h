// All that the kernels take from CUDA, in one place: compiled by nvcc it is the GPU's; compiled by
// a C++ compiler it is that of tests/cuda/emulator.h, so that tests run the same sources on a CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../half.h"
#include "launch.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace airl_fast::gpu {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), const LaunchShape& shape, void* stream,
            Args... args) {
  if (shape.blocks == 0) return;
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
  check(cudaGetLastError(), name);
}

// Clusters: on processors without them, and in launches without them, a block is one by itself.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ int cluster_size() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
template <class T>
__device__ __forceinline__ const T* in_block(const T* shared, int rank) {
  return static_cast<const T*>(__cluster_map_shared_rank(shared, rank));
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() { __syncthreads(); }
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ const T* in_block(const T* shared, int) {
  return shared;
}
#endif

extern __shared__ uint4 block_memory[];
__device__ __forceinline__ unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(block_memory);
}

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }
__device__ __forceinline__ void store8(void* p, uint2 x) { *static_cast<uint2*>(p) = x; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, BFloat16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}
__device__ __forceinline__ void from_float(float x, Float16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}

// Two elements in one word, the first in its low half.
__device__ __forceinline__ unsigned pack(float low, float high, BFloat16) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned pack(float low, float high, Float16) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(unsigned x) { return __uint_as_float(x); }

}  // namespace airl_fast::gpu

#else
#include "emulator.h"
#endif

namespace airl_fast::gpu {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace airl_fast::gpu
