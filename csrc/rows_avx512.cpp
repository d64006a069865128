// The row kernels for AVX-512 (its foundation alone): sixteen floats at a time.
#include "instruction_set.h"
#if AIRL_FAST_X86
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header (to version 12) spells an undefined vector as one initialised with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

AIRL_FAST_BEGIN_TARGET("avx512f")
#include "rows_kernels.h"
#include "vector_avx512.h"

namespace airl_fast {

const RowKernels& avx512_kernels() { return kernels_of<Avx512>(); }

}  // namespace airl_fast
AIRL_FAST_END_TARGET
#endif
