"""A roofline of a run: what was reached, under what a product and a copy reached in that run.

The roof is measured: the fastest matrix product of the run, and its fastest copy (bytes read and
written) of those that no cache holds. An operator over the head does the operations of the
products that it cannot do without, and moves its inputs and results once; a memory-bound operator
is counted as one multiply-add for each 4 bytes that it has to move. So a point under the roof is
time lost, whatever it was lost to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import OURS, Row

_DPI = 120
_CACHE = 256 * 2**20  # bytes: several times the caches of a GPU (50 MB on an H100, 60 on an H200)
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Point:
    """An operator at a shape: operations a byte, and operations a second."""

    label: str
    ours: bool
    intensity: float
    rate: float


def points(rows: Iterable[Row]) -> list[Point]:
    """The rows that have a speed and a limit; those of a sweep are left out."""
    found = []
    for row in rows:
        if row.status != "ok" or row.ms is None or row.group != "main":
            continue
        work = _work(row)
        if work is not None:
            operations, moved = work
            label = f"{row.operator}, {_sizes(row)}"
            rate = operations / row.ms * 1e3
            ours = row.peer == OURS and row.backend != "reference"
            found.append(Point(label, ours, operations / moved, rate))
    return found


def roof(rows: Iterable[Row]) -> tuple[float | None, float | None]:
    """Operations a second of the fastest product, bytes a second of the fastest large copy.

    Where no copy is larger than a cache, the largest one counts.
    """
    products: list[float] = []
    copies: list[tuple[float, float]] = []  # bytes, bytes a second
    for row in rows:
        if row.yardstick_ms is None:
            continue
        if row.yardstick == "product" and {"N", "V", "D"} <= row.shape.keys():
            products.append(_product(row) / row.yardstick_ms * 1e3)
        elif row.yardstick == "copy" and {"R", "V"} <= row.shape.keys():
            moved = 2 * row.shape["R"] * row.shape["V"] * _BYTES[row.dtype]
            copies.append((moved, moved / row.yardstick_ms * 1e3))
        elif row.yardstick == "copy" and "N" in row.shape:
            moved = 2 * row.shape["N"] * _BYTES[row.dtype]
            copies.append((moved, moved / row.yardstick_ms * 1e3))
    largest = max((moved for moved, _ in copies), default=0)
    outside = [rate for moved, rate in copies if moved >= min(largest, _CACHE)]
    return max(products, default=None), max(outside, default=None)


def _product(row: Row) -> float:
    return 2.0 * row.shape["N"] * row.shape["V"] * row.shape["D"]


def _work(row: Row) -> tuple[float, float] | None:
    """Operations and bytes that a row's operator cannot do without."""
    if row.least and {"N", "V", "D"} <= row.shape.keys():
        n, v, d = (row.shape[letter] for letter in "NVD")
        results = (n + (v if row.least >= 3 else 0)) * d if row.least >= 2 else 0
        moved = _BYTES[row.dtype] * ((n + v) * d + results)
        return row.least * _product(row), moved
    if row.gb_s is not None and row.ms is not None:
        moved = row.gb_s * row.ms * 1e6
        return moved / 2, moved
    return None


def _sizes(row: Row) -> str:
    return " ".join(f"{letter}={size:,}" for letter, size in row.shape.items())


def plot(rows: list[Row], folder: Path) -> str | None:
    """Write roofline.png; None where the run has no points or no roof."""
    from matplotlib import pyplot

    (peak, bandwidth), found = roof(rows), points(rows)
    if not found or (peak is None and bandwidth is None):
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    low = min(p.intensity for p in found) / 2
    high = max(p.intensity for p in found) * 2
    if bandwidth is not None:
        end = high if peak is None else peak / bandwidth
        axes.plot([low, end], [low * bandwidth, end * bandwidth], "k-", linewidth=1.5)
    if peak is not None:
        start = low if bandwidth is None else peak / bandwidth
        axes.plot([start, max(high, start)], [peak, peak], "k-", linewidth=1.5)
    for ours, name, marker in ((False, "peers", "x"), (True, "airl_fast", "o")):
        some = [p for p in found if p.ours == ours]
        axes.scatter(
            [p.intensity for p in some],
            [p.rate for p in some],
            label=name,
            marker=marker,
            s=40 if ours else 25,
            alpha=0.8,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that has to be moved",
        ylabel="operations per second",
        title="Roofline: under the product and the copy of the same run",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "roofline.png", dpi=_DPI)
    pyplot.close(figure)
    return "roofline.png"
