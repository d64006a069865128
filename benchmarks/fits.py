"""How a cost grows with a size: y = a + b x^p, with the interval of p.

Why not the slope on log-log paper: every call has a part that does not depend on the size (a
weight that is read once, the dispatch of a layer), and a slope through it reads too low. So a >= 0
is fitted along with b and p, by least squares on relative errors, because the largest sizes would
otherwise decide alone. Where nothing grows (the memory of the head) b is nearly 0 and p means
nothing: there the log-log slope is the right number, and both are always given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# 0.975 quantiles of Student's t by degrees of freedom, from 1 up; 1.96 beyond
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_EXPONENTS = np.linspace(-0.5, 4.0, 4501)


@dataclass(frozen=True)
class Growth:
    """A fit.

    Attributes:
        exponent: p of y = a + b x^p.
        low, high: its 95% interval, from the profile of the residuals.
        fixed, scale: a and b.
        slope: of log y against log x.
        slope_error: half of its 95% interval.
        residual: largest relative error of the fit.
    """

    exponent: float
    low: float
    high: float
    fixed: float
    scale: float
    slope: float
    slope_error: float
    residual: float


def fit_growth(x: Sequence[float], y: Sequence[float]) -> Growth:
    """Fit y = a + b x^p with a, b >= 0.

    Args:
        x: sizes, at least 4 different ones.
        y: costs at them, above 0.

    Raises:
        ValueError: fewer than 4 points, or a size or cost that is not above 0.
    """
    if len(x) != len(y) or len(set(x)) < 4:
        raise ValueError(f"expected 4 or more sizes with a cost each, received {len(set(x))}")
    if min(x) <= 0 or min(y) <= 0:
        raise ValueError(f"expected sizes and costs above 0, received {min(x)} and {min(y)}")
    sizes, costs = np.asarray(x, float), np.asarray(y, float)
    unit = sizes / sizes.max()  # so that b is the cost of the largest size, whatever p
    errors, fixed, scales = _profile(unit, costs)
    best = int(errors.argmin())
    a, b, p = float(fixed[best]), float(scales[best]), float(_EXPONENTS[best])
    freedom = len(x) - 3
    # the exponents whose residuals an F test does not tell from the best
    limit = errors[best] * (1 + _t(freedom) ** 2 / freedom) if freedom > 0 else math.inf
    inside = _EXPONENTS[errors <= max(limit, errors[best] + 1e-18)]
    slope, slope_error = _slope(np.log(sizes), np.log(costs))
    return Growth(
        exponent=p,
        low=float(inside.min()),
        high=float(inside.max()),
        fixed=a,
        scale=b / float(sizes.max()) ** p,
        slope=slope,
        slope_error=slope_error,
        residual=float(np.abs((a + b * unit**p) / costs - 1).max()),
    )


def _profile(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every exponent, by least squares on relative errors: their sum of squares, a and b."""
    u, w = 1 / y, x ** _EXPONENTS[:, None] / y  # [n], [exponents, n]
    uu, ww, uw, su, sw = u @ u, (w * w).sum(1), w @ u, u.sum(), w.sum(1)
    determinant = uu * ww - uw**2
    apart = determinant > 1e-12 * uu * ww  # x^0 is the fixed part again
    safe = np.where(apart, determinant, 1.0)
    nothing = np.zeros_like(sw)
    # non-negative least squares in two unknowns: both, or one of them alone
    candidates = [
        ((su * ww - sw * uw) / safe, (sw * uu - su * uw) / safe, apart),
        (nothing + su / uu, nothing, True),
        (nothing, sw / ww, True),
    ]
    found = []
    for a, b, valid in candidates:
        error = ((a[:, None] * u + b[:, None] * w - 1) ** 2).sum(1)
        found.append((np.where(valid & (a >= 0) & (b >= 0), error, np.inf), a, b))
    errors, a, b = (np.stack(parts) for parts in zip(*found, strict=True))
    choice = errors.argmin(0), np.arange(len(_EXPONENTS))
    return errors[choice], a[choice], b[choice]


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of a straight line and half of its 95% interval."""
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread))
    rest = y - y.mean() - slope * spread
    variance = float(rest @ rest) / (len(x) - 2) / float(spread @ spread)
    return slope, _t(len(x) - 2) * math.sqrt(variance)


def _t(freedom: int) -> float:
    return _T[freedom - 1] if 1 <= freedom <= len(_T) else 1.96
