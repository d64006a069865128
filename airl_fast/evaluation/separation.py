"""How well a score tells right traces from wrong ones, and what else it follows.

M traces, each of one of P prompts. Intervals come from resampling prompts, not traces: traces of
one prompt are not independent. Everything is float64 numpy; nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.evaluation.numbers import Array, auc, bootstrap_interval

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """A value, its bootstrap interval, and how many prompts it rests on."""

    value: float
    low: float
    high: float
    prompts: int


def pooled_auc(
    score: ArrayLike, label: ArrayLike, prompt: ArrayLike, seed: int, n: int = 1000
) -> Measured:
    """AUC over all traces at once: it also rewards knowing which prompts are easy.

    Args:
        score: [M], finite, higher is righter.
        label: [M], booleans, both present.
        prompt: [M], equal where traces answer the same prompt.
        seed: makes the interval reproducible.
        n: number of resamples of the prompts; those without both labels are left out.
    """
    scores, labels, index = _traces(score, label, prompt)
    value = auc(scores, labels)
    # Ranks are made once; a resample only weighs the traces.
    order = np.argsort(scores, kind="stable")
    _, block = np.unique(scores[order], return_inverse=True)
    positive, members = labels[order].astype(float), index[order]

    def weighted(weight: Array) -> float:
        right, wrong = weight[members] * positive, weight[members] * (1 - positive)
        ups = np.bincount(block, weights=right)
        downs = np.bincount(block, weights=wrong)
        pairs = ups.sum() * downs.sum()
        below = np.cumsum(downs) - downs
        return float((ups * (below + downs / 2)).sum() / pairs) if pairs else np.nan

    return resampled(value, weighted, int(index.max()) + 1, seed, n)


def within_auc(score: ArrayLike, label: ArrayLike, prompt: ArrayLike, seed: int) -> Measured:
    """Mean over prompts of the AUC among their own traces.

    Prompts whose traces are all right or all wrong say nothing and are left out: ``prompts`` is
    the number that remain.

    Raises:
        ValueError: none remains.
    """
    scores, labels, index = _traces(score, label, prompt)
    values = []
    for p in range(int(index.max()) + 1):
        mine = index == p
        if labels[mine].any() and not labels[mine].all():
            values.append(auc(scores[mine], labels[mine]))
    if not values:
        raise ValueError(
            "no prompt has both right and wrong traces: expected one or more; give several "
            "completions of each prompt"
        )
    low, high = bootstrap_interval(values, seed)
    return Measured(float(np.mean(values)), low, high, len(values))


def correlation(
    score: ArrayLike, length: ArrayLike, prompt: ArrayLike, seed: int, n: int = 1000
) -> Measured:
    """Pearson correlation of score and length, NaN where one of them does not vary."""
    (scores, lengths), index = _columns(prompt, score, length)
    return resampled(
        _correlation(scores, lengths, np.ones(scores.size)),
        lambda weight: _correlation(scores, lengths, weight[index]),
        int(index.max()) + 1,
        seed,
        n,
    )


def partial_correlation(
    score: ArrayLike,
    length: ArrayLike,
    label: ArrayLike,
    prompt: ArrayLike,
    seed: int,
    n: int = 1000,
) -> Measured:
    """Correlation of score and length among traces of equal correctness.

    That of what is left of both once correctness is regressed out: each less its mean over the
    right traces, or over the wrong ones.
    """
    columns, index = _columns(prompt, score, length, label)

    def value(weight: Array) -> float:
        scores, lengths, labels = columns
        left = [_centred(column, labels, weight) for column in (scores, lengths)]
        return _correlation(left[0], left[1], weight)

    return resampled(
        value(np.ones(columns[0].size)),
        lambda weight: value(weight[index]),
        int(index.max()) + 1,
        seed,
        n,
    )


def difference_at_equal(
    score: ArrayLike,
    flag: ArrayLike,
    label: ArrayLike,
    prompt: ArrayLike,
    seed: int,
    n: int = 1000,
) -> Measured:
    """Mean score of flagged less unflagged traces, at equal correctness.

    The two differences (among right traces, among wrong ones) are averaged with weights
    n1 n0 / (n1 + n0), those of a regression on the flag with an offset for each class. NaN where
    neither class has both. With "formatted" as the flag: what a format alone is worth.

    Args:
        score: [M], finite.
        flag: [M], booleans.
        label: [M], booleans: the classes.
        prompt: [M], equal where traces answer the same prompt.
        seed: makes the interval reproducible.
        n: number of resamples.
    """
    columns, index = _columns(prompt, score, flag, label)

    def value(weight: Array) -> float:
        scores, flags, labels = columns
        total, share = 0.0, 0.0
        for kind in (0.0, 1.0):
            on = weight * ((labels == kind) & (flags == 1))
            off = weight * ((labels == kind) & (flags == 0))
            if on.sum() and off.sum():
                mine = on.sum() * off.sum() / (on.sum() + off.sum())
                gap = (scores * on).sum() / on.sum() - (scores * off).sum() / off.sum()
                total, share = total + mine * gap, share + mine
        return total / share if share else np.nan

    return resampled(
        value(np.ones(columns[0].size)),
        lambda weight: value(weight[index]),
        int(index.max()) + 1,
        seed,
        n,
    )


def resampled(
    value: float, statistic: Callable[[Array], float], prompts: int, seed: int, n: int
) -> Measured:
    """A statistic's 95% percentile interval over resamples of the prompts.

    Args:
        value: of the data as they are.
        statistic: of weights [P], how often each prompt was drawn; NaN where it is not defined,
            which leaves the resample out.
        prompts: P.
        seed: makes it reproducible.
        n: number of resamples.
    """
    rng = np.random.default_rng(seed)
    even = np.full(prompts, 1 / prompts)
    found = np.array([statistic(rng.multinomial(prompts, even).astype(float)) for _ in range(n)])
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if found.size else (np.nan, np.nan)
    return Measured(float(value), float(low), float(high), prompts)


def _correlation(x: Array, y: Array, weight: Array) -> float:
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    spread = (weight * x * x).sum() * (weight * y * y).sum()
    return float((weight * x * y).sum() / np.sqrt(spread)) if spread > 0 else np.nan


def _centred(values: Array, labels: Array, weight: Array) -> Array:
    left = np.zeros_like(values)
    for kind in (0.0, 1.0):
        mine = labels == kind
        if weight[mine].sum():
            left[mine] = values[mine] - np.average(values[mine], weights=weight[mine])
    return left


def _columns(prompt: ArrayLike, *values: ArrayLike) -> tuple[list[Array], Index]:
    columns = [np.asarray(column, np.float64) for column in values]
    prompts = np.asarray(prompt)
    sizes = [list(column.shape) for column in columns]
    if any(c.shape != prompts.shape or c.ndim != 1 or c.size == 0 for c in columns):
        raise ValueError(
            f"expected vectors of one value per trace, got shapes {sizes} and prompts "
            f"{list(prompts.shape)}"
        )
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("expected finite values, got some that are not; leave those traces out")
    return columns, np.unique(prompts, return_inverse=True)[1].astype(np.int64)


def _traces(score: ArrayLike, label: ArrayLike, prompt: ArrayLike) -> tuple[Array, Array, Index]:
    columns, index = _columns(prompt, score, label)
    return columns[0], columns[1], index
