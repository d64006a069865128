// The device that the emulator stands for: one with clusters of blocks.
#include "device.h"

namespace airl_fast::gpu {

OnDevice::OnDevice(int index) : index_(index) {}
OnDevice::~OnDevice() = default;
Device OnDevice::describe() const { return {9, 227 * 1024, 4}; }

}  // namespace airl_fast::gpu
