"""Finding the first wrong step of traces, some of which have none.

P traces. A step's score is low where it is wrong. Labels are ProcessBench's: the 0-based index of
the first wrong step, -1 where every step is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.evaluation.calibration import prompt_folds
from airl_fast.evaluation.numbers import Array


@dataclass(frozen=True)
class FirstError:
    """ProcessBench's measures.

    Attributes:
        accuracy_error: share of the traces with an error whose first one is named.
        accuracy_correct: share of the traces without one that are said to have none.
        f1: harmonic mean of the two.
    """

    accuracy_error: float
    accuracy_correct: float
    f1: float


def first_below(scores: Sequence[float], threshold: float) -> int:
    """The first step that scores below the threshold, or -1."""
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


def first_error(predicted: ArrayLike, label: ArrayLike) -> FirstError:
    """Compare predictions with labels, both [P], -1 for "no error".

    NaN stands for the accuracy of a kind that is absent, and for the F1 then.
    """
    said, true = np.asarray(predicted), np.asarray(label)
    if said.shape != true.shape or said.ndim != 1 or said.size == 0:
        raise ValueError(f"expected one prediction per label, got {said.shape} and {true.shape}")
    wrong = true >= 0
    on_error = float((said == true)[wrong].mean()) if wrong.any() else np.nan
    on_correct = float((said == true)[~wrong].mean()) if not wrong.all() else np.nan
    total = on_error + on_correct
    f1 = 2 * on_error * on_correct / total if total > 0 else total
    return FirstError(on_error, on_correct, float(f1))


def best_threshold(step_scores: Sequence[Sequence[float]], label: ArrayLike) -> float:
    """The threshold of ``first_below`` with the highest F1; the lowest of equals.

    Between any two neighbouring scores every threshold says the same, so all that differ are
    tried: O(steps of all traces), by the running minimum of each trace.

    Raises:
        ValueError: traces with an error only, or without one only.
    """
    labels = np.asarray(label)
    _check_steps(step_scores, labels)
    if (labels < 0).all() or (labels >= 0).all():
        raise ValueError(
            "expected traces with an error and traces without one, got one kind only; no "
            "threshold can be chosen on them"
        )
    # A trace says step i for thresholds in (min of steps up to i, min of steps before i].
    gains: list[tuple[float, float, float]] = []  # threshold from which on, change of either count
    right_at_start = 0.0  # at minus infinity all say "no error"
    for row, true in zip(step_scores, labels, strict=True):
        lows = np.minimum.accumulate(np.asarray(row, np.float64))
        if true < 0:
            right_at_start += 1
            gains.append((float(lows[-1]), 0.0, -1.0))
            continue
        before = lows[true - 1] if true else np.inf
        if lows[true] < before:
            gains.append((float(lows[true]), 1.0, 0.0))
            gains.append((float(before), -1.0, 0.0))
    errors, fine = float((labels >= 0).sum()), float((labels < 0).sum())
    gains.sort()
    best, where, hits, kept, i = -1.0, -np.inf, 0.0, right_at_start, 0
    while i < len(gains) and np.isfinite(gains[i][0]):
        score = gains[i][0]
        while i < len(gains) and gains[i][0] == score:
            hits, kept, i = hits + gains[i][1], kept + gains[i][2], i + 1
        on_error, on_correct = hits / errors, kept / fine
        total = on_error + on_correct
        f1 = 2 * on_error * on_correct / total if total else 0.0
        if f1 > best:
            after = gains[i][0] if i < len(gains) else np.inf
            best = f1
            where = (score + after) / 2 if np.isfinite(after) else float(np.nextafter(score, after))
    return float(where)


def _check_steps(step_scores: Sequence[Sequence[float]], labels: NDArray[np.int64]) -> None:
    if len(step_scores) != len(labels):
        raise ValueError(
            f"expected one label per trace, got {len(step_scores)} traces and {len(labels)} labels"
        )
    for i, (row, true) in enumerate(zip(step_scores, labels, strict=True)):
        scores = np.asarray(row, np.float64)
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
            raise ValueError(
                f"trace {i}: received scores of {list(row)}, expected one finite score or more; "
                "leave it out"
            )
        if not -1 <= true < scores.size:
            raise ValueError(
                f"trace {i}: received a label of {true}, expected -1 or less than {scores.size}; "
                "the steps count from 0"
            )


def cross_validated_first_error(
    step_scores: Sequence[Sequence[float]],
    label: ArrayLike,
    prompt: ArrayLike,
    seed: int,
    folds: int = 5,
) -> NDArray[np.int64]:
    """The predicted first error of every trace, [P], by a threshold chosen on other prompts.

    Raises:
        ValueError: fewer than two prompts, or a fold leaves one kind of traces only.
    """
    labels = np.asarray(label)
    fold = prompt_folds(prompt, seed, folds)
    predicted = np.zeros(labels.size, np.int64)
    for k in range(int(fold.max()) + 1):
        rest = np.flatnonzero(fold != k).tolist()
        threshold = best_threshold([step_scores[i] for i in rest], labels[rest])
        for i in np.flatnonzero(fold == k).tolist():
            predicted[i] = first_below(step_scores[i], threshold)
    return predicted


def error_ranks(step_scores: Sequence[Sequence[float]], label: ArrayLike) -> tuple[Array, Array]:
    """The rank of the first error among its trace's steps, from the lowest score (1) up.

    Equal scores share their mean rank. Traces without an error are left out.

    Returns:
        The ranks, and what a random order would give on average, (steps + 1) / 2: both [E].
    """
    ranks, chance = [], []
    for row, true in zip(step_scores, np.asarray(label), strict=True):
        if true < 0:
            continue
        scores = np.asarray(row, np.float64)
        lower, equal = (scores < scores[true]).sum(), (scores == scores[true]).sum()
        ranks.append(float(lower + (equal + 1) / 2))
        chance.append((scores.size + 1) / 2)
    return np.asarray(ranks), np.asarray(chance)
