"""Numbers that say what a policy and a reward are worth, each with its uncertainty.

P problems, n samples of each, K sample counts. Everything is float64 numpy on the CPU; nothing
here knows a model or a task. A function returns one value per problem wherever it can, so that
any of them goes into ``bootstrap_interval`` or, for two methods on the same problems,
``paired_bootstrap``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def pass_at_k(n: int, c: ArrayLike, k: int) -> Array:
    """Probability that at least one of k samples is right, estimated without bias from n.

    1 - C(n - c, k) / C(n, k), as a product that does not overflow (Chen et al. 2021,
    arXiv 2107.03374).

    Args:
        n: samples drawn of each problem.
        c: how many were right, integers in [0, n], any shape.
        k: 1 <= k <= n.

    Returns:
        float64 of the shape of ``c``, in [0, 1].
    """
    if not 1 <= k <= n:
        raise ValueError(f"expected 1 <= k <= n, got k={k}, n={n}; draw at least k samples")
    right = np.asarray(c)
    if not np.issubdtype(right.dtype, np.integer) or np.any((right < 0) | (right > n)):
        raise ValueError(f"expected c to be integers in [0, n={n}], got {right}")
    wrong = np.asarray(n - right, dtype=np.float64)[..., None]
    # C(n - c, k) / C(n, k) = prod_{i < k} (n - c - i) / (n - i), zero as soon as k > n - c.
    i = np.arange(k, dtype=np.float64)
    return 1.0 - np.prod(np.maximum(wrong - i, 0.0) / (n - i), axis=-1)


def best_of_n(correct: ArrayLike, score: ArrayLike, ks: Sequence[int]) -> Array:
    """Accuracy of keeping the highest-scoring of k samples: the expectation over random subsets.

    The expectation over all C(n, k) subsets is exact, not sampled: the sample of rank i (0 is the
    best) is kept with probability C(n - 1 - i, k - 1) / C(n, k). Samples with equal scores are
    equally likely to be kept.

    Args:
        correct: [P, n], booleans or values in [0, 1].
        score: [P, n], finite, higher is better.
        ks: K subset sizes in [1, n].

    Returns:
        [P, K]; its mean over problems is the curve. k = 1 is a random pick.
    """
    values, scores = _matching(correct, score)
    n = values.shape[1]
    if any(not 1 <= k <= n for k in ks):
        raise ValueError(f"expected every k in [1, n={n}], got {list(ks)}; draw more samples")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    ranked_scores = np.take_along_axis(scores, order, axis=1)
    for p in range(len(ranked)):
        ranked[p] = _mean_of_equals(ranked[p], ranked_scores[p])
    return np.stack([ranked @ _rank_weights(n, k) for k in ks], axis=1)


def majority_vote(
    answers: Sequence[Sequence[str | None]],
    correct: ArrayLike,
    *,
    ties: Literal["first", "score"] = "first",
    score: ArrayLike | None = None,
) -> Array:
    """Accuracy of the most frequent answer of each problem.

    Args:
        answers: [P][n]; None (no answer found) has no vote. A problem with no vote counts 0.
        correct: [P, n]. Where samples with the winning answer differ in it, their mean counts.
        ties: between equally frequent answers, the one that appeared ``first``, or the one whose
            samples have the highest total ``score``.
        score: [P, n], for ``ties="score"`` and only then.

    Returns:
        [P], in [0, 1].
    """
    if ties not in ("first", "score") or (ties == "score") != (score is not None):
        raise ValueError(
            f"expected ties='first' without score, or ties='score' with one, got ties={ties!r} "
            f"and score {'given' if score is not None else 'None'}"
        )
    values, tie_breakers = _matching(
        correct, np.zeros_like(correct, float) if score is None else score
    )
    return _vote(answers, values, np.ones_like(values), tie_breakers)


def weighted_vote(
    answers: Sequence[Sequence[str | None]], correct: ArrayLike, weight: ArrayLike
) -> Array:
    """Accuracy of the answer with the highest total weight; ties go to the first to appear.

    Args:
        answers: [P][n]; None has no vote.
        correct: [P, n], as in ``majority_vote``.
        weight: [P, n], finite and >= 0, such as a softmax over the rewards of a problem.

    Returns:
        [P], in [0, 1].
    """
    values, weights = _matching(correct, weight)
    if np.any(weights < 0):
        raise ValueError(
            f"expected weights >= 0, got {weights.min()}; turn rewards into weights, for example "
            "with a softmax over the samples of a problem"
        )
    return _vote(answers, values, weights, np.zeros_like(weights))


def auc(score: ArrayLike, label: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive outscores a negative, ties counting half.

    Args:
        score: [M], finite.
        label: [M], booleans or 0 and 1, both present.
    """
    scores, labels = np.asarray(score, np.float64).ravel(), np.asarray(label).ravel()
    if scores.shape != labels.shape or not np.all(np.isfinite(scores)):
        raise ValueError(
            f"expected finite scores and as many labels, got {scores.size} scores "
            f"({int((~np.isfinite(scores)).sum())} not finite) and {labels.size} labels"
        )
    if not np.all((labels == 0) | (labels == 1)):
        raise ValueError(f"expected labels of 0 and 1, got {np.unique(labels)[:8]}")
    positive = labels == 1
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        raise ValueError(f"expected both labels, got {n1} positives and {n0} negatives")
    _, block, size = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(size) - (size - 1) / 2)[block]  # equal scores share their average rank
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def bootstrap_interval(
    values: ArrayLike, seed: int, level: float = 0.95, n: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: [P], one value per independent unit: average the samples of a problem first.
        seed: makes the interval reproducible.
        level: in (0, 1).
        n: number of resamples.
    """
    return _percentiles(_resampled_means(_units(values), seed, n), level)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over problems, its bootstrap interval, and a two-sided p-value for 0."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, seed: int, level: float = 0.95, n: int = 2000
) -> PairedDifference:
    """Compare two methods on the same problems by resampling the problems.

    Args:
        a: [P], one value per problem.
        b: [P], the other method's, in the same order.
        seed: makes the result reproducible.
        level: in (0, 1).
        n: number of resamples. The p-value, twice the smaller share of resampled differences
            on either side of 0 with one added to both counts, is never below 2 / (n + 1).
    """
    first, second = _units(a), _units(b)
    if first.shape != second.shape:
        raise ValueError(
            f"expected one value of each method per problem, got {first.size} and {second.size}; "
            "use bootstrap_interval on each for different problems"
        )
    means = _resampled_means(first - second, seed, n)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    low, high = _percentiles(means, level)
    return PairedDifference(
        float((first - second).mean()), low, high, min(1.0, 2 * (tail + 1) / (n + 1))
    )


def paired_bootstrap_of_runs(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], seed: int, level: float = 0.95, n: int = 2000
) -> PairedDifference:
    """Compare two methods over several runs: resample the runs, then each one's problems.

    With few runs their spread is what little of it was seen: of three, one resample in nine is
    three times the same run.

    Args:
        a: [R][P], one value per problem of every run; P may differ between runs.
        b: [R][P], the other method's, in the same order.
        seed: makes the result reproducible.
        level: in (0, 1).
        n: number of resamples; as in ``paired_bootstrap``.

    Returns:
        Of the mean over runs of the mean over problems.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"expected as many runs of each, one or more, got {len(a)} and {len(b)}")
    runs = []
    for first, second in zip(map(_units, a), map(_units, b), strict=True):
        if first.shape != second.shape:
            raise ValueError(
                f"expected one value of each method per problem of a run, got {first.size} and "
                f"{second.size}; compare runs on the same problems"
            )
        runs.append(first - second)
    rng = np.random.default_rng(seed)
    draws = n * len(runs)
    inner = np.stack([d[rng.integers(d.size, size=(draws, d.size))].mean(1) for d in runs])
    drawn = rng.integers(len(runs), size=(n, len(runs)))  # every draw of a run has its own problems
    means = inner[drawn, np.arange(draws).reshape(n, -1)].mean(1)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    low, high = _percentiles(means, level)
    difference = float(np.mean([d.mean() for d in runs]))
    return PairedDifference(difference, low, high, min(1.0, 2 * (tail + 1) / (n + 1)))


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), for independent trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"expected 0 <= successes <= trials > 0, got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + _checked_level(level)) / 2)
    p = successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    low = 0.0 if successes == 0 else float(middle - half)  # exactly so; rounding may miss it
    high = 1.0 if successes == trials else float(middle + half)
    return low, high


@dataclass(frozen=True)
class Localisation:
    """How often the lowest-scoring step is the planted error, and how often a guess would be."""

    accuracy: float
    chance: float
    hits: Array  # [P], in [0, 1]; fractions are ties


def locate_accuracy(
    step_scores: Sequence[Sequence[float]], error_step: Sequence[int]
) -> Localisation:
    """Score the localisation of one known wrong step per trace.

    Args:
        step_scores: [P][steps of the trace], finite; the lowest marks the error. When m steps
            share the lowest score and the error is one of them, it counts 1 / m.
        error_step: [P], 0-based index of the wrong step.

    Returns:
        The accuracy; the chance level, the mean of 1 / steps; and the hit of every trace.
    """
    if len(step_scores) != len(error_step) or len(step_scores) == 0:
        raise ValueError(
            f"expected one error step per trace and at least one trace, got {len(step_scores)} "
            f"traces and {len(error_step)} error steps"
        )
    hits, chance = np.zeros(len(step_scores)), np.zeros(len(step_scores))
    for p, (row, error) in enumerate(zip(step_scores, error_step, strict=True)):
        scores = np.asarray(row, np.float64)
        if not 0 <= error < scores.size or not np.all(np.isfinite(scores)):
            raise ValueError(
                f"trace {p}: expected finite scores and an error step in [0, {scores.size}), got "
                f"{error} and scores {list(row)}; leave out traces without an error"
            )
        lowest = scores == scores.min()
        hits[p] = lowest[error] / lowest.sum()
        chance[p] = 1 / scores.size
    return Localisation(float(hits.mean()), float(chance.mean()), hits)


def _vote(
    answers: Sequence[Sequence[str | None]], correct: Array, weight: Array, tie_breaker: Array
) -> Array:
    """Highest total weight wins; then highest total tie-breaker; then the first to appear."""
    if len(answers) != len(correct) or any(len(row) != correct.shape[1] for row in answers):
        raise ValueError(
            f"expected answers of the shape of correct, {list(correct.shape)}, got {len(answers)} "
            f"rows of {sorted({len(row) for row in answers})} answers"
        )
    result = np.zeros(len(answers))
    for p, row in enumerate(answers):
        members: dict[str, list[int]] = {}
        for i, answer in enumerate(row):
            if answer is not None:
                members.setdefault(answer, []).append(i)
        if members:  # dicts keep the order of appearance, and max returns the first of equals
            winner = max(
                members.values(), key=lambda at: (weight[p, at].sum(), tie_breaker[p, at].sum())
            )
            result[p] = correct[p, winner].mean()
    return result


def _rank_weights(n: int, k: int) -> Array:
    """[n]: the probability that the sample of rank i is the best of a random k-subset."""
    weights = np.zeros(n)
    weights[0] = k / n
    for i in range(1, n - k + 1):  # C(n-1-i, k-1) / C(n-i, k-1) = (n - i - k + 1) / (n - i)
        weights[i] = weights[i - 1] * (n - i - k + 1) / (n - i)
    return weights


def _mean_of_equals(values: Array, key: Array) -> Array:
    """[n]: each value replaced by the mean over the entries with the same key."""
    _, block, size = np.unique(key, return_inverse=True, return_counts=True)
    return (np.bincount(block, weights=values) / size)[block]


def _matching(correct: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    """Two [P, n] float64 arrays, checked."""
    values, scores = np.array(correct, np.float64), np.asarray(other, np.float64)
    if values.ndim != 2 or values.shape != scores.shape or 0 in values.shape:
        raise ValueError(
            f"expected two arrays of one shape [problems, samples], got {list(values.shape)} and "
            f"{list(scores.shape)}"
        )
    if not np.all(np.isfinite(scores)) or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(
            "expected finite scores or weights, and correctness in [0, 1]; got "
            f"{int((~np.isfinite(scores)).sum())} that are not finite, and correctness from "
            f"{values.min()} to {values.max()}"
        )
    return values, scores


def _units(values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or not np.all(np.isfinite(array)):
        raise ValueError(
            f"expected finite values [P] with P >= 1, got shape {list(array.shape)} with "
            f"{int((~np.isfinite(array)).sum())} that are not finite"
        )
    return array


def _resampled_means(values: Array, seed: int, n: int) -> Array:
    if n < 1:
        raise ValueError(f"expected resamples of 1 or more, got {n}; 2000 is the default")
    rng = np.random.default_rng(seed)
    return np.array([values[rng.integers(values.size, size=values.size)].mean() for _ in range(n)])


def _percentiles(means: Array, level: float) -> tuple[float, float]:
    tail = (1 - _checked_level(level)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, such as 0.95, got {level}")
    return level
