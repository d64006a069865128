// The kernels of attention; see airl_fast/ops/_row_attention.py and _packed_attention.py.
#pragma once

#include <pybind11/pybind11.h>

namespace airl_fast {

void bind_attention(pybind11::module_& m);

}  // namespace airl_fast
