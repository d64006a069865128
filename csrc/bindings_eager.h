// The span kernels called on tensors themselves, in one step each; see airl_fast/ops/_eager.py.
#pragma once

#include <Python.h>

namespace airl_fast {

// Adds the functions eager_* to a module; throws pybind11::error_already_set.
void bind_eager(PyObject* module);

}  // namespace airl_fast
