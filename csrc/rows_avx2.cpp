// The row kernels for AVX2.
#include "instruction_set.h"
#if AIRL_FAST_X86
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

AIRL_FAST_BEGIN_TARGET("avx2,fma,f16c")
#include "rows_kernels.h"
#include "vector_avx2.h"

namespace airl_fast {

const RowKernels& avx2_kernels() { return kernels_of<Avx2>(); }

}  // namespace airl_fast
AIRL_FAST_END_TARGET
#endif
