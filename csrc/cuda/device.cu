#include "device.h"

namespace airl_fast::gpu {

OnDevice::OnDevice(int index) : index_(index) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (index_ != before_) check(cudaSetDevice(index_), "cudaSetDevice");
}

OnDevice::~OnDevice() {
  if (index_ != before_) cudaSetDevice(before_);  // an error would be the launch's, and said there
}

Device OnDevice::describe() const {
  const auto attribute = [this](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrComputeCapabilityMajor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMultiProcessorCount)};
}

}  // namespace airl_fast::gpu
