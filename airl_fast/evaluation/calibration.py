"""From scores to probabilities that a trace is right, and how far to trust them.

M traces. The probabilities are made by Platt's sigmoid, fitted on other prompts than it is used
on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from airl_fast.evaluation.numbers import Array


@dataclass(frozen=True)
class Platt:
    """P(right) = sigmoid(slope * score + offset)."""

    slope: float
    offset: float

    def __call__(self, score: ArrayLike) -> Array:
        """Return the probabilities, of the shape of ``score``."""
        z = self.slope * np.asarray(score, np.float64) + self.offset
        return np.exp(-np.logaddexp(0.0, -z))


def platt_fit(score: ArrayLike, label: ArrayLike) -> Platt:
    """Fit Platt's sigmoid by maximum likelihood.

    The targets are (n1 + 1) / (n1 + 2) for right and 1 / (n0 + 2) for wrong traces (Platt 1999),
    so that the fit is finite where the scores separate the classes. By Newton's method on
    standardised scores, with halved steps where one would not go down.

    Args:
        score: [M], finite.
        label: [M], booleans, both present.
    """
    scores, labels = np.asarray(score, np.float64), np.asarray(label, np.float64)
    if not np.all((labels == 0) | (labels == 1)):
        raise ValueError(f"expected labels of 0 and 1, got {np.unique(labels)[:8]}")
    n1 = float(labels.sum())
    n0 = labels.size - n1
    if scores.shape != labels.shape or not np.isfinite(scores).all() or min(n1, n0) < 1:
        raise ValueError(
            f"expected finite scores and as many labels of both kinds, got {scores.size} scores, "
            f"{n1:.0f} right and {n0:.0f} wrong"
        )
    target = np.where(labels == 1, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    mean, scale = float(scores.mean()), float(scores.std()) or 1.0
    x = np.stack([(scores - mean) / scale, np.ones_like(scores)], axis=1)
    w = np.array([0.0, np.log((n1 + 1) / (n0 + 1))])

    def loss(w: Array) -> float:
        z = x @ w
        return float((np.logaddexp(0.0, z) - target * z).sum())

    now = loss(w)
    for _ in range(100):
        p = Platt(1.0, 0.0)(x @ w)
        slope = x.T @ (p - target)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        while (then := loss(w - step)) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        w = w - step
        if np.abs(step).max() < 1e-10:
            break
        now = then
    return Platt(float(w[0] / scale), float(w[1] - w[0] * mean / scale))


def cross_validated(
    score: ArrayLike, label: ArrayLike, prompt: ArrayLike, seed: int, folds: int = 5
) -> Array:
    """P(right) of every trace, from a sigmoid fitted on the other folds' prompts.

    Args:
        score: [M], finite.
        label: [M], booleans.
        prompt: [M], equal where traces answer the same prompt: a prompt is in one fold only.
        seed: of the division into folds.
        folds: how many; fewer where there are fewer prompts.

    Returns:
        [M], in (0, 1).

    Raises:
        ValueError: a fold leaves traces of one kind only to fit on.
    """
    scores, labels = np.asarray(score, np.float64), np.asarray(label, bool)
    fold = prompt_folds(prompt, seed, folds)
    result = np.zeros(scores.shape)
    for k in range(int(fold.max()) + 1):
        result[fold == k] = platt_fit(scores[fold != k], labels[fold != k])(scores[fold == k])
    return result


def prompt_folds(prompt: ArrayLike, seed: int, folds: int = 5) -> Array:
    """The fold of every trace, [M]: prompts in random order, dealt out in turn.

    Raises:
        ValueError: fewer than two prompts.
    """
    _, index = np.unique(np.asarray(prompt), return_inverse=True)
    prompts = int(index.max()) + 1
    if prompts < 2:
        raise ValueError("cross-validation needs two prompts or more, got one; give more rows")
    place = np.random.default_rng(seed).permutation(prompts)
    return np.asarray((place % min(folds, prompts))[index])


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width over [0, 1], and two measures of the whole.

    Attributes:
        count: traces of every bin.
        probability: their mean probability, NaN in an empty bin.
        accuracy: the share of them that is right, NaN in an empty bin.
        ece: expected calibration error: |probability - accuracy|, weighted by count.
        brier: mean squared distance of probability and outcome.
    """

    count: list[int]
    probability: list[float]
    accuracy: list[float]
    ece: float
    brier: float


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> Reliability:
    """Compare probabilities with outcomes.

    Args:
        probability: [M], in [0, 1].
        label: [M], booleans.
        bins: of equal width; 1.0 belongs to the last.
    """
    p, y = np.asarray(probability, np.float64), np.asarray(label, np.float64)
    if p.shape != y.shape or p.size == 0 or not ((p >= 0) & (p <= 1)).all() or bins < 1:
        raise ValueError(
            f"expected probabilities in [0, 1], as many labels and a bin or more, got {p.size}"
            f"{f' from {p.min()} to {p.max()}' if p.size else ''}, {y.size} and {bins}"
        )
    place = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=p, minlength=bins) / count
        right = np.bincount(place, weights=y, minlength=bins) / count
    gaps = np.where(count > 0, count * np.abs(mean - right), 0.0)
    return Reliability(
        count.tolist(),
        mean.tolist(),
        right.tolist(),
        float(np.nansum(gaps) / p.size),
        float(((p - y) ** 2).mean()),
    )
