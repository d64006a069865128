// A device "cuda" for torch's build for CPUs, whose memory is the CPU's.
//
// Operators that have no kernel for it fall through to `on_the_cpu`: it calls the CPU's kernel with
// tensors that share the arguments' memory, and gives back what comes out as tensors of the device.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <set>
#include <string>
#include <vector>

// Autograd asks a device's guard for its streams.
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

namespace {

const c10::Device kHere(c10::kCUDA, 0);

std::atomic<size_t> held{0}, most{0};  // bytes of the device

void release(void* data) {
  held -= malloc_usable_size(data);
  std::free(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    const size_t now = held += malloc_usable_size(data);
    for (size_t before = most; before < now && !most.compare_exchange_weak(before, now);) {
    }
    return {data, data, &release, kHere};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(c10::kCUDA, &memory)

}  // namespace

extern "C" size_t stand_in_held() { return held; }
extern "C" size_t stand_in_most() { return most; }
extern "C" void stand_in_forget() { most = held.load(); }

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return kHere; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(kCPU); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return globalContext().defaultGenerator(kCPU);
  }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

using at::Tensor;
using std::optional;

// The same memory, as a tensor of the CPU.
Tensor seen(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  const auto options = x.options().device(c10::kCPU);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [x](void*) {}, options);
}

Tensor brought(const Tensor& x) {
  if (!x.defined() || x.is_cuda()) return x;
  Tensor out = at::empty_strided(x.sizes(), x.strides(), x.options().device(kHere));
  seen(out).copy_(x);
  return out;
}

bool written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Whose indices may be in the CPU's memory.
const std::set<std::string> kIndexed = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

// What one call is given: tensors of the device are replaced by what the CPU sees of them.
struct Call {
  const c10::FunctionSchema& schema;
  bool here = false;
  bool elsewhere = false;

  Tensor look(const Tensor& x, bool anywhere = false) {
    if (x.defined() && !anywhere) {
      here |= x.is_cuda();
      elsewhere |= !x.is_cuda() && x.dim() > 0;  // numbers may be anywhere
    }
    return seen(x);
  }

  void replace(c10::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) {
      const Tensor given = value.toTensor();
      Tensor x = look(given);
      // Memory of another cannot grow; and oneDNN's bfloat16 product reads past the end of a row
      // of an odd number of elements.
      if (written(argument) && given.numel() == 0) x = at::empty({0}, x.options());
      const bool product = schema.name() == "aten::mm" || schema.name() == "aten::addmm";
      value = product && !written(argument) ? x.contiguous() : x;
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : value.toTensorVector()) list.push_back(look(x));
      value = list;
    } else if (value.isList() &&
               value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
      const bool indexed = kIndexed.count(schema.name()) > 0;
      c10::List<optional<Tensor>> list;
      for (const c10::IValue& x : value.toListRef())
        list.push_back(x.isNone() ? optional<Tensor>() : look(x.toTensor(), indexed));
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (argument.name() == "pin_memory") {
      value = false;
    }
  }
};

// What a call gave back: a tensor that it wrote into is the one that it was given.
void give_back(c10::IValue& value, const c10::Argument& declared, const c10::FunctionSchema& schema,
               const std::vector<c10::IValue>& given) {
  if (written(declared)) {
    for (size_t i = 0; i < given.size(); ++i) {
      const auto& argument = schema.arguments()[i];
      if (!written(argument) || !given[i].isTensor()) continue;
      if (*argument.alias_info() != *declared.alias_info()) continue;
      const Tensor out = given[i].toTensor(), result = value.toTensor();
      if (out.sizes() != result.sizes()) {
        out.resize_(result.sizes());
        seen(out).copy_(result);
      }
      value = out;
    }
  } else if (value.isTensor()) {
    value = brought(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& x : value.toTensorVector()) list.push_back(brought(x));
    value = list;
  }
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), returned = schema.returns().size();
  const std::vector<c10::IValue> given(stack->end() - count, stack->end());
  Call call{schema};
  for (size_t i = 0; i < count; ++i)
    call.replace((*stack)[stack->size() - count + i], schema.arguments()[i]);
  TORCH_CHECK(!(call.here && call.elsewhere),
              "Expected all tensors to be on the same device, but found cuda:0 and cpu in ",
              schema.name());
  op.callBoxed(stack);
  for (size_t r = 0; r < returned; ++r)
    give_back((*stack)[stack->size() - returned + r], schema.returns()[r], schema, given);
}

using Size = at::SymIntArrayRef;
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

Tensor empty(Size size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Size size, Size stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &memory, kKeys,
                                           c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  seen(self).copy_(seen(source));
  return self;
}

// Which kernel serves attention: plain products.
int64_t fused_choice(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double,
                     bool, optional<double>, bool) {
  return 0;
}

Tensor view(const Tensor& self, Size size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, Size size, Size stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor as_strided(const Tensor& self, Size size, Size stride, optional<c10::SymInt> offset) {
  const auto start = offset ? optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), start);
}

const Tensor& resize_(const Tensor& self, Size size, optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_part(Tensor& self, at::Storage source, c10::SymInt offset, Size size, Size stride) {
  return at::native::set_storage_cpu_(self, source, offset.expect_int(),
                                      C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.dtype().itemsize();
  return at::native::set_storage_cpu_(self, source, 0, {size}, {});
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_fused_sdp_choice", &fused_choice);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("as_strided", &as_strided);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_part);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
}

}  // namespace
