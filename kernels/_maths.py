"""Device functions that several kernels share: logits to z, online sums relative to a maximum.

``z = outer tanh(inner (a + bias))``, or ``inner (a + bias)`` without a soft-cap, as in csrc/rows.h.
"""

import triton
import triton.language as tl


@triton.jit
def column_of(target, vocab):
    """The column of an int64 target, int32; -1 where it is none: nothing may be read there."""
    return tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)


@triton.jit
def tanh_and_slope(y):
    """Tanh of y, and ``1 - tanh(y)^2``, for float32 of any shape; NaN comes through.

    Below 5/8 a polynomial, beyond it ``1 - u`` with ``u = 2 / (exp(2 |y|) + 1)``, whose slope
    ``u (2 - u)`` loses no digits where tanh nears 1 (csrc/rows_kernels.h has the same).
    """
    size = tl.abs(y)
    square = y * y
    q = -5.717044953e-03
    q = q * square + 2.065058722e-02
    q = q * square - 5.374349806e-02
    q = q * square + 1.333149129e-01
    q = q * square - 3.333328393e-01
    near = q * square * y + y
    u = 2.0 / (tl.exp(2.0 * tl.where(size > 20.0, 20.0, size)) + 1.0)
    far = tl.where(y < 0, u - 1.0, 1.0 - u)
    is_near = size < 0.625
    return tl.where(is_near, near, far), tl.where(is_near, 1.0 - near * near, u * (2.0 - u))


@triton.jit
def shape_logits(a, bias, inner, outer, CAPPED: tl.constexpr):
    """Z of float32 logits a, and ``dz/da`` over its value at 0 (the number 1 without a cap)."""
    y = (a + bias) * inner
    slope = 1.0
    if CAPPED:
        y, slope = tanh_and_slope(y)
        y = y * outer
    return y, slope


@triton.jit
def rescale(largest, top):
    """How sums relative to a maximum ``largest`` are carried to a larger one.

    Returns the number to subtract from now on (0 while there is nothing but -inf, so that sums
    stay 0 and NaN still comes through), the factor for the sums, and how far the maximum rose.
    """
    base = tl.where(top == float("-inf"), 0.0, top)
    rise = tl.where(largest == float("-inf"), 0.0, base - largest)
    return base, tl.exp(largest - base), rise
