// A span kernel takes a microsecond on a few thousand values, and a call of the custom operator
// with its checks a hundred. Here one call looks at the tensors, computes and makes the result.
//
// Each function returns None where the operator itself has to serve: for anything out of the
// ordinary, and whatever is wrong, of which the operator's own checks then speak. It returns False
// where that is so only because a gradient is to be recorded.
#include "bindings_eager.h"

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "exchange.h"
#include "segments.h"

namespace airl_fast {
namespace {

// What eager_prepare was given; borrowed for good. Without an exchange nothing is served here.
struct Torch {
  const dlpack::Exchange* exchange;
  PyObject *tensor, *forced, *dual_levels;
  PyObject *grad_enabled, *function_modes, *dispatch_modes, *transforms, *tracing, *threads;
};
Torch torch{};

PyObject *requires_grad, *is_neg, *dual_level;  // names

constexpr std::int64_t kUnlocked = 1 << 14;  // values from which the interpreter lock is let go

// A new reference that is let go at the end.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  bool is(PyObject* other) const { return object_ == other; }
  bool is_integer(long value) const {
    return object_ != nullptr && PyLong_CheckExact(object_) && PyLong_AsLong(object_) == value;
  }
  bool is_text(const char* value) const {
    return object_ != nullptr && PyUnicode_CheckExact(object_) &&
           PyUnicode_CompareWithASCIIString(object_, value) == 0;
  }

 private:
  PyObject* object_;
};

PyObject* call(PyObject* function) { return PyObject_CallNoArgs(function); }

// Whether the backend is left to the library, or is the one served here.
bool backend_is_ours() {
  PyObject* chosen = nullptr;
  if (PyContextVar_Get(torch.forced, nullptr, &chosen) != 0) return false;
  const Owned forced(chosen);
  if (chosen != nullptr && chosen != Py_None) return forced.is_text("cpu");
  const char* variable = std::getenv("AIRL_FAST_BACKEND");
  return variable == nullptr || *variable == '\0' || std::strcmp(variable, "cpu") == 0;
}

// Whether nothing is there that follows or changes what operators do: modes of torch, functorch's
// transforms, the tracer of torch.jit, forward-mode differentiation.
bool nothing_watches() {
  return Owned(call(torch.function_modes)).is_integer(0) &&
         Owned(call(torch.dispatch_modes)).is_integer(0) &&
         Owned(call(torch.transforms)).is(Py_False) && Owned(call(torch.tracing)).is(Py_False) &&
         Owned(PyObject_GetAttr(torch.dual_levels, dual_level)).is_integer(-1);
}

bool is_vector(const dlpack::Tensor& t, std::uint8_t code) {
  return t.ndim == 1 && t.device_type == dlpack::kCPU && t.type_code == code && t.lanes == 1 &&
         (t.data != nullptr || t.shape[0] == 0);
}

template <typename T>
View<T> view(const dlpack::Tensor& t) {
  return {reinterpret_cast<const T*>(static_cast<const char*>(t.data) + t.byte_offset),
          t.strides == nullptr ? 1 : t.strides[0]};
}

// A plain floating-point vector that is what it seems (a tensor may stand for its negative).
bool read_values(PyObject* object, dlpack::Tensor* out) {
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(torch.tensor) &&
         Owned(PyObject_VectorcallMethod(is_neg, &object, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                         nullptr))
             .is(Py_False) &&
         torch.exchange->view(object, out) == 0 && is_vector(*out, dlpack::kFloat) &&
         (out->bits == 32 || out->bits == 64);
}

bool read_offsets(PyObject* object, Offsets* out) {
  dlpack::Tensor t;
  if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(torch.tensor) ||
      torch.exchange->view(object, &t) != 0 || !is_vector(t, dlpack::kInt) || t.bits != 32 ||
      t.shape[0] < 1) {
    return false;
  }
  const View<std::int32_t> cu = view<std::int32_t>(t);
  *out = {cu.data, t.shape[0] - 1};
  return cu.stride == 1 || out->spans == 0;
}

// Whether a gradient would be lost: False or True, or nothing with an exception set.
PyObject* records(PyObject* x) {
  const Owned required(PyObject_GetAttr(x, requires_grad));
  return required.is(Py_True) ? call(torch.grad_enabled) : Py_NewRef(Py_False);
}

int thread_count(std::int64_t values) {
  if (values < kSharedValues) return 1;
  PyObject* count = call(torch.threads);
  const Owned owned(count);
  return count == nullptr ? 1 : static_cast<int>(PyLong_AsLong(count));
}

template <typename T>
constexpr std::uint8_t kCode = std::is_integral_v<T> ? dlpack::kInt : dlpack::kFloat;

// A vector of T in one piece of memory with what describes it, which goes when it does.
struct Vector {
  dlpack::Managed managed;
  std::int64_t length;
  void* memory;

  static constexpr std::size_t kAligned = 64;  // as torch's own memory is

  static void release(dlpack::Managed* managed) {
    std::free(static_cast<Vector*>(managed->context)->memory);
  }

  // Null where there is no memory left.
  template <typename T>
  static Vector* make(std::int64_t length, T** values) {
    const std::size_t bytes = static_cast<std::size_t>(length) * sizeof(T);
    void* memory = std::malloc(bytes + sizeof(Vector) + kAligned);
    if (memory == nullptr) return nullptr;
    const auto after = reinterpret_cast<std::uintptr_t>(memory) + sizeof(Vector) + kAligned - 1;
    void* data = reinterpret_cast<void*>(after / kAligned * kAligned);
    auto* vector = new (memory) Vector{};
    vector->length = length;
    vector->memory = memory;
    vector->managed.version = {dlpack::kMajor, 0};
    vector->managed.context = vector;
    vector->managed.deleter = release;
    vector->managed.tensor = {data, dlpack::kCPU, 0, 1, kCode<T>, 8 * sizeof(T), 1,
                              &vector->length, nullptr, 0};
    *values = static_cast<T*>(data);
    return vector;
  }
};

// A new tensor of T filled by run(T*), without the interpreter lock where `work` is large;
// null where run returns false, or where there can be none.
template <typename T, class Run>
PyObject* filled(std::int64_t length, std::int64_t work, Run run) {
  T* out;
  Vector* made = Vector::make(length, &out);
  if (made == nullptr) return nullptr;
  PyThreadState* unlocked = work < kUnlocked ? nullptr : PyEval_SaveThread();
  const bool sound = run(out);
  if (unlocked != nullptr) PyEval_RestoreThread(unlocked);
  void* result = nullptr;
  if (!sound) {
    Vector::release(&made->managed);
  } else if (torch.exchange->import_managed(&made->managed, &result) != 0) {
    return nullptr;
  }
  return static_cast<PyObject*>(result);
}

PyObject* left_to_the_operator() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// Reads valid values and offsets, where nothing stands in the way but perhaps a gradient.
bool read_inputs(PyObject* x, PyObject* cu, dlpack::Tensor* values, Offsets* at) {
  return torch.exchange != nullptr && backend_is_ours() && nothing_watches() &&
         read_values(x, values) && read_offsets(cu, at) && partitions(*at, values->shape[0]);
}

// The result of run(values, offsets, threads, out), of length N if kPerValue, else S.
template <bool kPerValue, class Run>
PyObject* over_spans(PyObject* x, PyObject* cu, Run run) {
  dlpack::Tensor values;
  Offsets at;
  if (!read_inputs(x, cu, &values, &at)) return left_to_the_operator();
  const Owned recorded(records(x));
  if (recorded.is(Py_True)) Py_RETURN_FALSE;
  if (!recorded.is(Py_False)) return left_to_the_operator();
  const std::int64_t total = values.shape[0];
  const int threads = thread_count(total);
  PyObject* result = filled<float>(kPerValue ? total : at.spans, total, [&](float* out) {
    return values.bits == 32 ? run(view<float>(values), at, threads, out)
                             : run(view<double>(values), at, threads, out);
  });
  return result == nullptr ? left_to_the_operator() : result;
}

bool expects(const char* name, Py_ssize_t count, Py_ssize_t expected) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, received %zd", name, expected, count);
  return false;
}

template <bool kMean>
PyObject* eager_sum(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_sum", count, 2)) return nullptr;
  return over_spans<false>(given[0], given[1], [](auto x, Offsets at, int threads, float* out) {
    segment_sum(x, at, kMean, threads, out);
    return true;
  });
}

PyObject* eager_last(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_last", count, 2)) return nullptr;
  return over_spans<false>(given[0], given[1], [](auto x, Offsets at, int threads, float* out) {
    segment_last(x, at, threads, out);
    return true;
  });
}

// The index of the last value of each span, int64 [S]: torch differentiates what it selects.
PyObject* eager_ends(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_ends", count, 2)) return nullptr;
  dlpack::Tensor values;
  Offsets at;
  if (!read_inputs(given[0], given[1], &values, &at)) return left_to_the_operator();
  PyObject* result = filled<std::int64_t>(at.spans, at.spans, [&](std::int64_t* out) {
    for (std::int64_t s = 0; s < at.spans; ++s) out[s] = at.cu[s + 1] - 1;
    return true;
  });
  return result == nullptr ? left_to_the_operator() : result;
}

PyObject* eager_softmax(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_softmax", count, 2)) return nullptr;
  return over_spans<true>(given[0], given[1], [](auto x, Offsets at, int threads, float* out) {
    segment_softmax(x, at, threads, out);
    return true;
  });
}

// Returns of finite rewards, or their adjoint, which may overflow.
PyObject* eager_returns(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_returns", count, 4)) return nullptr;
  if (!PyFloat_CheckExact(given[2]) && !PyLong_CheckExact(given[2])) Py_RETURN_NONE;
  const double gamma = PyFloat_AsDouble(given[2]);
  if (!(gamma >= 0.0 && gamma <= 1.0)) return left_to_the_operator();
  const bool forwards = given[3] == Py_True;
  return over_spans<true>(given[0], given[1], [=](auto x, Offsets at, int threads, float* out) {
    return discounted_scan(x, at, gamma, forwards, threads, out) || forwards;
  });
}

// Gradients: the result of run(gradient, offsets, threads, out), [N], for a float32 gradient [S],
// or [N] if kPerValue. N is read from the offsets, which the forward pass has checked once.
template <bool kPerValue, class Run>
PyObject* gradient_of(PyObject* g, PyObject* cu, Run run) {
  if (torch.exchange == nullptr || !backend_is_ours() || !nothing_watches()) {
    return left_to_the_operator();
  }
  dlpack::Tensor values;
  Offsets at;
  if (!read_values(g, &values) || values.bits != 32 || !read_offsets(cu, &at)) {
    return left_to_the_operator();
  }
  const std::int64_t total = at.total();
  if (!partitions(at, total) || values.shape[0] != (kPerValue ? total : at.spans) ||
      !Owned(records(g)).is(Py_False)) {
    return left_to_the_operator();
  }
  const int threads = thread_count(total);
  PyObject* result = filled<float>(total, total, [&](float* out) {
    return run(view<float>(values), at, threads, out);
  });
  return result == nullptr ? left_to_the_operator() : result;
}

template <bool kMean>
PyObject* eager_spread(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_spread", count, 2)) return nullptr;
  return gradient_of<false>(given[0], given[1],
                            [](View<float> g, Offsets at, int threads, float* out) {
                              segment_spread(g, at, kMean, threads, out);
                              return true;
                            });
}

PyObject* eager_softmax_gradient(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_softmax_gradient", count, 3)) return nullptr;
  dlpack::Tensor p;
  if (torch.exchange == nullptr || !read_values(given[2], &p) || p.bits != 32 ||
      view<float>(p).stride != 1 || !Owned(records(given[2])).is(Py_False)) {
    return left_to_the_operator();
  }
  return gradient_of<true>(given[0], given[1],
                           [&](View<float> g, Offsets at, int threads, float* out) {
                             if (p.shape[0] != at.total()) return false;
                             segment_softmax_gradient(view<float>(p).data, g, at, threads, out);
                             return true;
                           });
}

// eager_prepare(capsule, tensor, forced, forward_ad, grad_enabled, function_modes,
// dispatch_modes, transforms, tracing, threads); whether the eager functions serve from now on.
PyObject* eager_prepare(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!expects("eager_prepare", count, 10)) return nullptr;
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(given[0], kName)) Py_RETURN_FALSE;
  auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(given[0], kName));
  if (exchange->version.major != dlpack::kMajor || exchange->view == nullptr) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(given[i]);
  torch = {exchange, given[1], given[2], given[3], given[4],
           given[5], given[6], given[7], given[8], given[9]};
  Py_RETURN_TRUE;
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Fast function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

}  // namespace

void bind_eager(PyObject* module) {
  static PyMethodDef methods[] = {method("eager_prepare", eager_prepare),
                                  method("eager_sum", eager_sum<false>),
                                  method("eager_mean", eager_sum<true>),
                                  method("eager_last", eager_last),
                                  method("eager_ends", eager_ends),
                                  method("eager_softmax", eager_softmax),
                                  method("eager_returns", eager_returns),
                                  method("eager_spread", eager_spread<false>),
                                  method("eager_spread_mean", eager_spread<true>),
                                  method("eager_softmax_gradient", eager_softmax_gradient),
                                  {}};
  requires_grad = PyUnicode_InternFromString("requires_grad");
  is_neg = PyUnicode_InternFromString("is_neg");
  dual_level = PyUnicode_InternFromString("_current_level");
  if (requires_grad == nullptr || is_neg == nullptr || dual_level == nullptr ||
      PyModule_AddFunctions(module, methods) != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace airl_fast
