"""Everything that scored traces with known faults say about a reward, as one tree of numbers.

The reward stands beside its baselines throughout: a random pick, the majority, the policy's log pi
(sum and mean), and an oracle. A section that the data cannot give says why. Seeds are explicit,
and every interval is a 95% bootstrap over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from airl_fast.evaluation.calibration import cross_validated, reliability
from airl_fast.evaluation.numbers import (
    Array,
    best_of_n,
    bootstrap_interval,
    locate_accuracy,
    majority_vote,
    paired_bootstrap,
    pass_at_k,
    weighted_vote,
)
from airl_fast.evaluation.separation import (
    Measured,
    correlation,
    difference_at_equal,
    partial_correlation,
    pooled_auc,
    resampled,
    within_auc,
)
from airl_fast.evaluation.steps import cross_validated_first_error, error_ranks, first_error

REWARD = "f"  # what the library ranks and locates with
_SUBSETS = 200  # most subsets of a prompt's completions that a vote is averaged over
_BINS = 30


@dataclass(frozen=True, kw_only=True)
class JudgedTrace:
    """One scored trace and what is known about it.

    Attributes:
        prompt: number of its prompt.
        correct: whether it is right; of a trace with labelled steps, whether none is wrong.
        answer: its final answer, None where none can be read.
        length: its tokens.
        scores: by the name of what gave them.
        candidate: whether it is one of several answers to choose from.
        steps: the scores of its steps, by the same names; None without labelled steps.
        label: its first wrong step, -1 for none; None without labelled steps.
    """

    prompt: int
    correct: bool
    answer: str | None
    length: int
    scores: dict[str, float]
    candidate: bool = True
    steps: dict[str, list[float]] | None = field(default=None, repr=False)
    label: int | None = None


def measure(traces: Sequence[JudgedTrace], *, seed: int = 0) -> dict[str, Any]:
    """Measure a reward; every section is a dict of numbers, or ``{"skipped": reason}``.

    Args:
        traces: one or more, with scores of the same names, "f" among them.
        seed: of intervals, folds and subsets.

    Returns:
        ``data``, ``best_of_n``, ``auc``, ``localisation``, ``calibration``, ``bias`` and
        ``histogram``: numbers, lists and texts, NaN where a number is not defined.
    """
    if not traces:
        raise ValueError("expected one trace or more, got none: every row was left out")
    names = list(traces[0].scores)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "best_of_n": lambda: _best_of_n(traces, names, seed),
        "auc": lambda: _auc(traces, names, seed),
        "localisation": lambda: _localisation(traces, names, seed),
        "calibration": lambda: _calibration(traces, names, seed),
        "bias": lambda: _bias(traces, names, seed),
        "histogram": lambda: _histogram(traces, names),
    }
    return {"data": _data(traces), **{name: _tried(make) for name, make in sections.items()}}


class _Skipped(Exception):  # noqa: N818 - not an error: a section that the data cannot give
    pass


def _tried(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except _Skipped as reason:
        return {"skipped": str(reason)}


def _data(traces: Sequence[JudgedTrace]) -> dict[str, Any]:
    labelled = [trace for trace in traces if trace.label is not None]
    return {
        "traces": len(traces),
        "prompts": len({trace.prompt for trace in traces}),
        "correct": float(np.mean([trace.correct for trace in traces])),
        "candidates": sum(trace.candidate for trace in traces),
        "without_answer": sum(trace.candidate and trace.answer is None for trace in traces),
        "with_labelled_steps": len(labelled),
        "with_wrong_step": sum(trace.label != -1 for trace in labelled),
        "mean_tokens": float(np.mean([trace.length for trace in traces])),
    }


def _columns(traces: Sequence[JudgedTrace]) -> tuple[Array, Array]:
    """Labels and prompts, both [M]."""
    labels = np.array([trace.correct for trace in traces], np.float64)
    if labels.all() or not labels.any():
        kind = "right" if labels.all() else "wrong"
        raise _Skipped(f"every trace is {kind}; right and wrong ones are needed")
    return labels, np.array([trace.prompt for trace in traces])


def _score(traces: Sequence[JudgedTrace], name: str) -> Array:
    return np.array([trace.scores[name] for trace in traces])


def _best_of_n(traces: Sequence[JudgedTrace], names: list[str], seed: int) -> dict[str, Any]:
    groups: dict[int, list[int]] = {}
    for i, trace in enumerate(traces):
        if trace.candidate:
            groups.setdefault(trace.prompt, []).append(i)
    several = [members for members in groups.values() if len(members) > 1]
    if not several:
        raise _Skipped("no prompt has two completions or more to choose from")
    smallest = min(map(len, several))
    ks = sorted({2**i for i in range(smallest.bit_length()) if 2**i <= smallest} | {smallest})
    correct = [np.array([float(traces[i].correct) for i in members]) for members in several]
    answers = [[traces[i].answer for i in members] for members in several]

    curves = {"random": np.repeat([[one.mean()] for one in correct], len(ks), axis=1)}  # [P, K]
    voted = {"majority": [np.ones(len(members)) for members in several]}
    try:
        labels, prompts = _columns(traces)
        right = cross_validated(_score(traces, REWARD), labels, prompts, seed)
        voted["vote weighted by f"] = [right[members] for members in several]
    except (ValueError, _Skipped):
        pass  # a calibration needs both kinds in every fold; the section on it says so
    for name, weights in voted.items():
        votes = [
            _vote_curve(answers[p], correct[p], weights[p], ks, seed + p)
            for p in range(len(several))
        ]
        curves[name] = np.stack(votes)
    for name in names:
        value = _score(traces, name)
        picks = [best_of_n([correct[p]], [value[several[p]]], ks)[0] for p in range(len(several))]
        curves[name] = np.stack(picks)
    hits = [[pass_at_k(one.size, int(one.sum()), k) for k in ks] for one in correct]
    curves["oracle"] = np.array(hits, np.float64)
    last = curves[REWARD][:, -1]
    others = [name for name in curves if name not in (REWARD, "oracle")]
    return {
        "prompts": len(several),
        "prompts_with_one_completion_left_out": len(groups) - len(several),
        "smallest_number_of_completions": smallest,
        "k": ks,
        "curves": {name: _curve(values, seed) for name, values in curves.items()},
        "f_less": {
            name: asdict(paired_bootstrap(last, curves[name][:, -1], seed)) for name in others
        },
    }


def _curve(values: Array, seed: int) -> dict[str, list[float]]:
    bounds = [bootstrap_interval(column, seed) for column in values.T]
    return {
        "value": values.mean(0).tolist(),
        "low": [low for low, _ in bounds],
        "high": [high for _, high in bounds],
    }


def _vote_curve(
    answers: list[str | None], correct: Array, weight: Array, ks: Sequence[int], seed: int
) -> Array:
    """Accuracy of the vote over subsets of k: all of them, or as many drawn at random."""
    n, rng = len(answers), np.random.default_rng(seed)
    even = bool((weight == 1).all())
    result = []
    for k in ks:
        if math.comb(n, k) <= _SUBSETS:
            subsets = np.array(list(combinations(range(n), k)))
        else:
            subsets = np.stack([rng.permutation(n)[:k] for _ in range(_SUBSETS)])
        rows = [[answers[i] for i in subset] for subset in subsets]
        of_rows = correct[subsets]
        vote = (
            majority_vote(rows, of_rows) if even else weighted_vote(rows, of_rows, weight[subsets])
        )
        result.append(vote.mean())
    return np.array(result)


def _auc(traces: Sequence[JudgedTrace], names: list[str], seed: int) -> dict[str, Any]:
    labels, prompts = _columns(traces)
    found: dict[str, Any] = {}
    for name in names:
        value = _score(traces, name)
        found[name] = {"pooled": asdict(pooled_auc(value, labels, prompts, seed))}
        try:
            found[name]["within_prompt"] = asdict(within_auc(value, labels, prompts, seed))
        except ValueError as error:
            found[name]["within_prompt"] = {"skipped": str(error)}
    return {"by_score": found, "random": 0.5, "oracle": 1.0}


def _localisation(traces: Sequence[JudgedTrace], names: list[str], seed: int) -> dict[str, Any]:
    labelled = [trace for trace in traces if trace.label is not None]
    labels = np.array([trace.label for trace in labelled])
    wrong = [trace for trace in labelled if trace.label != -1]
    if not wrong:
        raise _Skipped("no trace has a step that is known to be wrong")
    prompts = np.array([trace.prompt for trace in labelled])
    sizes = np.array([len(_steps(trace, names[0])) for trace in labelled])
    errors = [int(trace.label or 0) for trace in wrong]
    found: dict[str, Any] = {}
    for name in names:
        rows = [_steps(trace, name) for trace in labelled]
        lowest = locate_accuracy([_steps(trace, name) for trace in wrong], errors)
        ranks, chance = error_ranks(rows, labels)
        found[name] = {
            "lowest_step": _mean(lowest.hits, seed),
            "mean_rank": _mean(ranks, seed),
            "processbench": _processbench(rows, labels, prompts, seed),
        }
    guess = 1 / (sizes + 1)  # one of the steps, or "no error"
    return {
        "traces": len(labelled),
        "with_wrong_step": len(wrong),
        "by_score": found,
        "random": {
            "lowest_step": float(lowest.chance),
            "mean_rank": float(chance.mean()),
            "accuracy_error": float(guess[labels >= 0].mean()),
            "accuracy_correct": float(guess[labels < 0].mean()) if (labels < 0).any() else math.nan,
        },
        "oracle": {"lowest_step": 1.0, "mean_rank": 1.0},
    }


def _processbench(
    rows: Sequence[list[float]], labels: Array, prompts: Array, seed: int
) -> dict[str, Any]:
    """F1 with a threshold chosen on other prompts, and its interval."""
    try:
        predicted = cross_validated_first_error(rows, labels, prompts, seed)
    except ValueError as error:
        return {"skipped": str(error)}
    hits, wrong = (predicted == labels).astype(float), labels >= 0
    _, index = np.unique(prompts, return_inverse=True)

    def f1(weight: Array) -> float:
        w = weight[index]
        if not w[wrong].sum() or not w[~wrong].sum():
            return math.nan
        a = float(np.average(hits[wrong], weights=w[wrong]))
        b = float(np.average(hits[~wrong], weights=w[~wrong]))
        return 2 * a * b / (a + b) if a + b else 0.0

    found = first_error(predicted, labels)
    interval = resampled(found.f1, f1, int(index.max()) + 1, seed, 1000)
    return asdict(found) | {"f1": asdict(interval)}


def _steps(trace: JudgedTrace, name: str) -> list[float]:
    assert trace.steps is not None
    return trace.steps[name]


def _calibration(traces: Sequence[JudgedTrace], names: list[str], seed: int) -> dict[str, Any]:
    labels, prompts = _columns(traces)
    found: dict[str, Any] = {}
    for name in names:
        try:
            right = cross_validated(_score(traces, name), labels, prompts, seed)
        except ValueError as error:
            raise _Skipped(str(error)) from None
        found[name] = asdict(reliability(right, labels))
    base = float(labels.mean())
    return {
        "by_score": found,
        "always_the_mean": {"ece": 0.0, "brier": base * (1 - base)},
    }


def _bias(traces: Sequence[JudgedTrace], names: list[str], seed: int) -> dict[str, Any]:
    labels = np.array([trace.correct for trace in traces], np.float64)
    prompts = np.array([trace.prompt for trace in traces])
    lengths = np.array([trace.length for trace in traces], np.float64)
    formatted = np.array([trace.answer is not None for trace in traces], np.float64)
    found: dict[str, Any] = {}
    for name in names:
        value = _score(traces, name)
        spread = float(value.std()) or 1.0
        gap = difference_at_equal(value / spread, formatted, labels, prompts, seed)
        found[name] = {
            "length": asdict(correlation(value, lengths, prompts, seed)),
            "length_at_equal_correctness": asdict(
                partial_correlation(value, lengths, labels, prompts, seed)
            ),
            "format_in_deviations": asdict(gap),
        }
    return {
        "by_score": found,
        "correctness_with_length": asdict(correlation(labels, lengths, prompts, seed)),
        "formatted": float(formatted.mean()),
    }


def _histogram(traces: Sequence[JudgedTrace], names: list[str]) -> dict[str, Any]:
    labels = np.array([trace.correct for trace in traces], bool)
    found = {}
    for name in names:
        value = _score(traces, name)
        edges = np.histogram_bin_edges(value, bins=_BINS)
        found[name] = {
            "edges": edges.tolist(),
            "right": np.histogram(value[labels], edges)[0].tolist(),
            "wrong": np.histogram(value[~labels], edges)[0].tolist(),
        }
    return {"by_score": found}


def _mean(values: Array, seed: int) -> dict[str, Any]:
    low, high = bootstrap_interval(values, seed)
    return asdict(Measured(float(np.mean(values)), low, high, len(values)))
