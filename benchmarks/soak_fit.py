"""Whether a measured quantity stays flat over hours: Theil-Sen slopes with their intervals.

The samples of a soak are cut into ``BLOCKS`` blocks of equal time, each stands for its median, and
the slope is the median of the slopes between any two blocks (Theil 1950; its interval after Sen
1968, from the normal approximation of Kendall's statistic). A pause of the machine, which spoils
a few blocks, does not move it. Blocks, because samples seconds apart are not independent and would
make the interval too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 60
_Z = 1.959964  # of a two-sided 95% interval
_FEWEST = 8  # blocks below which the normal approximation says nothing


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What is held against a tolerance.

    Attributes:
        name: as it is shown.
        column: of the samples.
        per: another column; then the quantity is the growth of ``column`` over that of ``per``,
            both of which count up.
        unit: of a value.
        relative: whether slope and tolerance are in percent of the median value.
        tolerance: the largest slope, per hour, that is still called flat.
        lowest: whether a block stands for its lowest sample instead of its median: what is never
            given back raises it, what comes and goes within a step does not.
    """

    name: str
    column: str
    unit: str
    tolerance: float
    per: str | None = None
    relative: bool = False
    lowest: bool = False

    @property
    def slope_unit(self) -> str:
        """Of the slope and the tolerance."""
        return "% an hour" if self.relative else f"{self.unit} an hour".strip()


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The slope of a quantity.

    Attributes:
        quantity: what was measured.
        median: of the blocks.
        slope, low, high: per hour, and its 95% interval.
        verdict: "flat" if the whole interval is within the tolerance, "drifts" if none of it is,
            else "undecided": the soak was too short or too noisy to tell.
        blocks: how many the fit had.
    """

    quantity: Quantity
    median: float
    slope: float
    low: float
    high: float
    blocks: int

    @property
    def verdict(self) -> str:
        """Flat, drifts or undecided."""
        limit = self.quantity.tolerance
        if -limit <= self.low and self.high <= limit:
            return "flat"
        return "drifts" if self.low > limit or self.high < -limit else "undecided"


def theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """The slope of y over x [n] and its 95% interval.

    Raises:
        ValueError: fewer than 8 points, or values that are not finite.
    """
    if len(x) < _FEWEST or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"expected {_FEWEST} finite points or more, received {len(x)}: go longer")
    first, second = np.triu_indices(len(x), 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    n = len(x)
    half = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2
    low = max(0, math.floor(len(slopes) / 2 - half) - 1)
    high = min(len(slopes) - 1, math.ceil(len(slopes) / 2 + half))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def fit(samples: Sequence[dict[str, float]], quantity: Quantity) -> Trend:
    """Fit the trend of one quantity.

    Args:
        samples: in the order of time, each with "minutes" and the quantity's columns.
        quantity: what to fit.

    Raises:
        ValueError: too few samples.
    """
    hours, values = blocks(samples, quantity)
    slope, low, high = theil_sen(hours, values)
    median = float(np.median(values))
    scale = 100 / median if quantity.relative else 1.0
    return Trend(
        quantity=quantity,
        median=median,
        slope=slope * scale,
        low=low * scale,
        high=high * scale,
        blocks=len(values),
    )


def blocks(
    samples: Sequence[dict[str, float]], quantity: Quantity
) -> tuple[np.ndarray, np.ndarray]:
    """Hours and values of the blocks that have any samples, both [n].

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("expected samples after the warm-up, received none: go longer")
    minutes = np.array([sample["minutes"] for sample in samples])
    column = np.array([sample[quantity.column] for sample in samples])
    edges = np.linspace(minutes[0], minutes[-1], BLOCKS + 1)
    place = np.clip(np.searchsorted(edges, minutes, "right") - 1, 0, BLOCKS - 1)
    hours, values = [], []
    if quantity.per is None:
        for block in np.unique(place):
            inside = (place == block) & ~np.isnan(column)
            if inside.any():
                hours.append(minutes[inside].mean() / 60)
                middle = np.min if quantity.lowest else np.median
                values.append(middle(column[inside]))
        return np.array(hours), np.array(values)
    # From the last sample of a block to that of the next block in which anything was counted.
    counted = np.array([sample[quantity.per] for sample in samples])
    last = 0
    for block in np.unique(place):
        end = int(np.flatnonzero(place == block)[-1])
        if counted[end] > counted[last]:
            hours.append((minutes[end] + minutes[last]) / 120)
            values.append((column[end] - column[last]) / (counted[end] - counted[last]))
            last = end
    return np.array(hours), np.array(values)
