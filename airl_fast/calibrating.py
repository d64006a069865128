"""Fits a calibration to traces whose first wrong step is known.

    M traces   K steps of one

A label is the 0-based first wrong step, or -1 (as in ProcessBench). Value, rule and threshold are
those of the highest F1 there: the harmonic mean of the accuracies on traces with and without an
error. What all of this is worth is measured by cross-validation: every choice is made again
without the traces that judge it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from airl_fast.calibration import (
    Array,
    Calibration,
    Curve,
    Decider,
    Quality,
    Rule,
    Value,
    sigmoid,
    step_values,
)

_LEAST = 10  # traces of each kind: fewer say nothing about a threshold
_BINS = 10


@dataclass(frozen=True, kw_only=True)
class LabelledSteps:
    """A trace's steps as ``calibrate`` takes them.

    Attributes:
        f: of each of the K steps.
        num_tokens: of each.
        label: the first wrong step, 0-based; -1 for none.
    """

    f: tuple[float, ...]
    num_tokens: tuple[int, ...]
    label: int


def calibrate(
    traces: Sequence[LabelledSteps], *, folds: int = 5, seed: int = 0, weights: str = ""
) -> Calibration:
    """Choose how to decide, from M labelled traces.

    Args:
        traces: at least ten with an error and ten without.
        folds: of the cross-validation, 2 to 10.
        seed: of the folds.
        weights: kept as ``Calibration.weights``.

    Raises:
        ValueError: too few traces of a kind, a label that is no step, values that are not finite,
            or folds out of range.
    """
    _check(traces, folds)
    kinds = np.array([trace.label >= 0 for trace in traces])
    fold = _folds(kinds, folds, seed)
    chosen = _fit(traces)
    right, confidence = np.zeros((2, len(traces)))
    for k in range(folds):
        without = _fit([trace for trace, at in zip(traces, fold, strict=True) if at != k])
        inside = np.flatnonzero(fold == k)
        right[inside], confidence[inside] = _judged(without, [traces[i] for i in inside.tolist()])
    return Calibration(
        decider=chosen,
        traces=len(traces),
        erroneous=int(kinds.sum()),
        fitted=_quality(kinds, *_judged(chosen, traces)),
        held_out=_quality(kinds, right, confidence),
        folds=folds,
        seed=seed,
        weights=weights,
    )


def _fit(traces: Sequence[LabelledSteps]) -> Decider:
    """Choose value, rule and threshold by F1, the first of equals; then fit both curves."""
    labels = [trace.label for trace in traces]
    best: tuple[float, Value, Rule, float] | None = None
    for value in get_args(Value):
        rows = [step_values(value, trace.f, trace.num_tokens) for trace in traces]
        for rule in get_args(Rule):
            f1, threshold = _best_threshold(rows, labels, rule)
            if best is None or f1 > best[0]:
                best = f1, value, rule, threshold
    assert best is not None
    _, value, rule, threshold = best
    rows = [step_values(value, trace.f, trace.num_tokens) for trace in traces]
    scale = float(np.std(np.concatenate(rows))) or 1.0
    flat = Curve(a=0.0, b=0.0)
    chosen = Decider(
        value=value, rule=rule, threshold=threshold, scale=scale, located=flat, none=flat
    )
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for row, label in zip(rows, labels, strict=True):
        step, distance = chosen.placed(row)
        right = (-1 if step is None else step) == label
        points[step is not None].append((distance / scale, float(right)))
    located, none = (_platt(np.array(points[kind]).reshape(-1, 2)) for kind in (True, False))
    return replace(chosen, located=located, none=none)


def _best_threshold(
    rows: Sequence[Array], labels: Sequence[int], rule: Rule
) -> tuple[float, float]:
    """The highest F1 over all thresholds, and the middle of the widest range that has it.

    A trace is decided rightly by the thresholds t of one interval (low, high]: without an error up
    to its lowest value; with one from above the value of the wrong step on, up to the lowest before
    it ("first"), or without limit if it is the lowest ("lowest").
    """
    with_error, without = [], []
    for row, label in zip(rows, labels, strict=True):
        if label < 0:
            without.append((-np.inf, row.min()))
        elif rule == "first":
            before = row[:label].min() if label else np.inf
            if row[label] < before:
                with_error.append((row[label], before))
        elif row.argmin() == label:
            with_error.append((row[label], np.inf))
    edges = np.unique([row.min() for row in rows] + [x for pair in with_error for x in pair])
    edges = edges[np.isfinite(edges)]
    gap = float(np.ptp(edges)) or 1.0
    points = np.concatenate([[edges[0] - gap], edges, [edges[-1] + gap]])
    # Between two edges nothing changes; (low, high] holds the middle of what lies between.
    middles = (points[:-1] + points[1:]) / 2
    erroneous = sum(label >= 0 for label in labels)
    of_error = _covered(with_error, middles) / erroneous
    of_correct = _covered(without, middles) / (len(labels) - erroneous)
    f1 = _harmonic(of_error, of_correct)
    best = f1 == f1.max()
    width = np.where(best, np.diff(points), -1.0)
    at = int(width.argmax())
    return float(f1[at]), float(middles[at])


def _covered(intervals: Sequence[tuple[float, float]], points: Array) -> Array:
    """How many intervals hold each of the sorted points, none of which is an end of one."""
    if not intervals:
        return np.zeros(points.size)
    low, high = np.array(intervals, np.float64).T
    return np.asarray(
        np.searchsorted(np.sort(low), points) - np.searchsorted(np.sort(high), points), np.float64
    )


def _harmonic(one: Array, other: Array) -> Array:
    total = one + other
    return np.divide(2 * one * other, total, out=np.zeros_like(total), where=total > 0)


def _platt(points: Array) -> Curve:
    """Logistic regression with Platt's targets, (n1 + 1) / (n1 + 2) and 1 / (n0 + 2).

    Convex: Newton's method, the step halved while the loss would grow. A slope below 0 becomes 0.
    ``points`` [n, 2] are distances and whether they are right.
    """
    distance, right = points.T
    n1, n0 = right.sum(), (1 - right).sum()
    target = np.where(right > 0, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    constant = Curve(a=float(np.log((n1 + 1) / (n0 + 1))), b=0.0)
    if not distance.size or not np.ptp(distance):
        return constant
    x = np.stack([np.ones_like(distance), distance], 1)

    def loss(theta: Array) -> float:
        z = x @ theta
        return float(np.sum(np.logaddexp(0, z) - target * z))

    theta = np.array([constant.a, 0.0])
    for _ in range(100):
        p = sigmoid(x @ theta)
        gradient = x.T @ (p - target)
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        step = np.linalg.solve(hessian + 1e-9 * np.eye(2), gradient)
        while loss(theta - step) > loss(theta) and np.abs(step).max() > 1e-12:
            step /= 2
        theta = theta - step
        if np.abs(step).max() < 1e-10:
            break
    return Curve(a=float(theta[0]), b=float(theta[1])) if theta[1] > 0 else constant


def _judged(decider: Decider, traces: Sequence[LabelledSteps]) -> tuple[Array, Array]:
    """Whether each decision is right, and the confidence in it."""
    right, confidence = np.zeros((2, len(traces)))
    for i, trace in enumerate(traces):
        step, confidence[i], _ = decider.decide(trace.f, trace.num_tokens)
        right[i] = (-1 if step is None else step) == trace.label
    return right, confidence


def _quality(kinds: NDArray[np.bool_], right: Array, confidence: Array) -> Quality:
    of_error, of_correct = right[kinds].mean(), right[~kinds].mean()
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, min(_BINS, len(order)))
    gaps = [len(b) * abs(confidence[b].mean() - right[b].mean()) for b in bins]
    return Quality(
        f1=float(_harmonic(np.array(of_error), np.array(of_correct))),
        accuracy_erroneous=float(of_error),
        accuracy_correct=float(of_correct),
        calibration_error=float(sum(gaps) / len(right)),
        brier=float(np.mean((confidence - right) ** 2)),
    )


def _folds(kinds: NDArray[np.bool_], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each trace: every fold has its share of both kinds."""
    rng = np.random.default_rng(seed)
    fold = np.zeros(len(kinds), np.int64)
    for kind in (True, False):
        members = rng.permutation(np.flatnonzero(kinds == kind))
        fold[members] = np.arange(members.size) % folds
    return fold


def _check(traces: Sequence[LabelledSteps], folds: int) -> None:
    if not 2 <= folds <= _LEAST:
        raise ValueError(f"expected 2 to {_LEAST} folds, received {folds}")
    for i, trace in enumerate(traces):
        steps = len(trace.f)
        if not -1 <= trace.label < steps:
            raise ValueError(
                f"trace {i}: expected a label from -1 (no error) to {steps - 1}, its last step, "
                f"received {trace.label}: labels count the steps from 0"
            )
        if not np.all(np.isfinite(trace.f)) or len(trace.num_tokens) != steps:
            raise ValueError(
                f"trace {i}: expected finite f and a token count of every step, received f of "
                f"{trace.f} and {len(trace.num_tokens)} counts: leave the trace out"
            )
    erroneous = sum(trace.label >= 0 for trace in traces)
    if min(erroneous, len(traces) - erroneous) < _LEAST:
        raise ValueError(
            f"expected {_LEAST} traces or more with an error and as many without, received "
            f"{erroneous} and {len(traces) - erroneous}: label more traces, a threshold fitted on "
            "fewer means nothing"
        )
