// How a kernel is launched, in plain C++.
#pragma once

#include <cstdint>

namespace airl_fast::gpu {

// What a launch needs to know of the device it goes to.
struct Device {
  int major;                  // compute capability; from 9 on blocks form clusters
  std::int64_t shared_bytes;  // of a block's shared memory, at most
  int processors;             // multiprocessors
};

// Makes a device the current one of this thread for as long as it lives; then the one before it is
// that again. Its constructor and `describe` throw std::runtime_error.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Device describe() const;

 private:
  int index_;
  int before_ = 0;
};

struct LaunchShape {
  std::int64_t blocks;  // a multiple of cluster
  int threads;          // a multiple of 32
  std::int64_t shared_bytes;
  int cluster;  // neighbouring blocks that run together and read each other's shared memory
};

}  // namespace airl_fast::gpu
