// What DLPack 1.x lays down for the exchange of tensors between C libraries within a process, as
// far as it is needed here. torch.Tensor.__dlpack_c_exchange_api__ holds a pointer to an Exchange.
#pragma once

#include <cstdint>

namespace airl_fast::dlpack {

constexpr std::int32_t kCPU = 1;                     // of device_type
constexpr std::uint8_t kInt = 0, kFloat = 2;         // of type_code
constexpr std::uint32_t kMajor = 1;                  // another one has another layout

struct Version {
  std::uint32_t major, minor;
};

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t type_code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null stands for contiguous
  std::uint64_t byte_offset;
};

struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  std::uint64_t flags;
  Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

// Functions return 0, or another number with a Python exception set.
struct Exchange {
  Version version;
  const void* previous;
  int (*allocate)(Tensor* prototype, Managed** out, void* error_context, SetError);
  int (*export_managed)(void* object, Managed** out);
  int (*import_managed)(Managed* tensor, void** out);  // takes the tensor over
  int (*view)(void* object, Tensor* out);              // valid while the object is; may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && sizeof(Managed) == 80 &&
                                     sizeof(Exchange) == 56));

}  // namespace airl_fast::dlpack
