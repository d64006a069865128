#include "device.h"

namespace airl_fast::gpu {

Device select_device(int index) {
  check(cudaSetDevice(index), "cudaSetDevice");
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrComputeCapabilityMajor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMultiProcessorCount)};
}

}  // namespace airl_fast::gpu
