"""The rows of the numbers of an evaluation."""

from __future__ import annotations

from typing import Any

from airl_fast import evaluation as e
from airl_fast.evaluation.calibration import platt_fit, reliability
from airl_fast.evaluation.separation import pooled_auc
from airl_fast.evaluation.steps import best_threshold, first_error
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
NAN = float("nan")
NONE = {
    "device": "takes arrays of the CPU",
    "offsets": "has no offsets",
    "file": "reads no file",
    "model": "knows no model",
}
ANSWERS = [["x", "y"], ["x", None]]
TWO = [[1, 0], [0, 1]]

_e = Entry(
    "evaluation.pass_at_k", CELLS, **NONE, shape="takes any shape", non_finite="takes integers"
)
_e.refuses("dtype", "c of 0.5", lambda _: e.pass_at_k(4, [0.5], 1), "got [0.5]", "integers in [0,")
_e.refuses("range", "c above n", lambda _: e.pass_at_k(4, [5], 1), "got [5]", "integers in [0,")
_e.refuses("negative", "c of -1", lambda _: e.pass_at_k(4, [-1], 1), "got [-1]", "integers in [0,")
_e.serves("empty", "no problems", lambda _: _no_problems(), "no values")
_e.refuses(
    "option",
    "k above n",
    lambda _: e.pass_at_k(4, [1], 5),
    "got k=5, n=4",
    "draw at least k samples",
)


def _no_problems() -> bool:
    import numpy as np

    return bool(e.pass_at_k(4, np.zeros(0, np.int64), 1).size == 0)


def votes(name: str) -> Any:
    if name == "weighted_vote":
        return lambda answers, correct, other: e.weighted_vote(answers, correct, other)
    if name == "majority_vote":
        return lambda answers, correct, other: e.majority_vote(
            answers, correct, ties="score", score=other
        )
    return lambda _, correct, other: e.best_of_n(correct, other, [1, 2])


for _name in ("best_of_n", "majority_vote", "weighted_vote"):
    _f = votes(_name)
    _e = Entry(f"evaluation.{_name}", CELLS, **NONE)
    _e.refuses(
        "shape",
        "3 scores for 2 samples",
        lambda _, f=_f: f(ANSWERS, TWO, [[1, 2, 3]] * 2),
        "got [2, 2] and [2, 3]",
        "of one shape [problems, samples]",
    )
    _e.refuses(
        "dtype",
        "texts for scores",
        lambda _, f=_f: f(ANSWERS, TWO, [["a", "b"]] * 2),
        "'a'",
        "float",
    )
    _e.refuses(
        "range",
        "a correctness of 2",
        lambda _, f=_f: f(ANSWERS, [[2, 0], [0, 1]], TWO),
        "to 2.0",
        "correctness in [0, 1]",
    )
    _e.refuses(
        "negative",
        "a correctness of -1",
        lambda _, f=_f: f(ANSWERS, [[-1, 0], [0, 1]], TWO),
        "from -1.0",
        "correctness in [0, 1]",
    )
    _e.refuses(
        "non-finite",
        "a score of NaN",
        lambda _, f=_f: f(ANSWERS, TWO, [[NAN, 0], [0, 1]]),
        "1 that are not finite",
        "expected finite scores",
    )
    _e.refuses(
        "empty",
        "no problems",
        lambda _, f=_f: f([], [], []),
        "got [0] and [0]",
        "of one shape [problems, samples]",
    )
_e.refuses(
    "negative",
    "a weight of -1",
    lambda _: e.weighted_vote(ANSWERS, TWO, [[-1, 1], [0, 1]]),
    "got -1.0",
    "with a softmax",
)
_e.refuses(
    "option",
    "answers of another shape",
    lambda _: e.weighted_vote([["x"]], TWO, TWO),
    "got 1 rows of [1]",
    "of the shape of correct",
)
Entry("evaluation.best_of_n", CELLS).refuses(
    "option",
    "k of 3 with 2 samples",
    lambda _: e.best_of_n(TWO, TWO, [3]),
    "got [3]",
    "draw more samples",
)
Entry("evaluation.majority_vote", CELLS).refuses(
    "option",
    'ties="score" without one',
    lambda _: e.majority_vote(ANSWERS, TWO, ties="score"),
    "score None",
    "ties='score' with one",
)

for _name, _f in (("evaluation.auc", e.auc), ("evaluation.calibration.platt_fit", platt_fit)):
    _e = Entry(_name, CELLS, **NONE, option="has none")
    _e.refuses(
        "shape",
        "2 scores and 3 labels",
        lambda _, f=_f: f([1.0, 2.0], [1, 0, 1]),
        "got 2 scores",
        "as many labels",
    )
    _e.refuses("dtype", "texts for scores", lambda _, f=_f: f(["a", "b"], [1, 0]), "'a'", "float")
    _e.refuses(
        "range", "a label of 2", lambda _, f=_f: f([1.0, 2.0, 0.0], [2, 0, 1]), "got", "of 0 and 1"
    )
    _e.refuses(
        "negative",
        "a label of -1",
        lambda _, f=_f: f([1.0, 2.0, 0.0], [-1, 0, 1]),
        "got",
        "of 0 and 1",
    )
    _e.refuses(
        "non-finite",
        "a score of NaN",
        lambda _, f=_f: f([NAN, 2.0], [1, 0]),
        "got 2 scores",
        "expected finite scores",
    )
    _e.refuses("empty", "nothing", lambda _, f=_f: f([], []), "got 0", "both")

_e = Entry(
    "evaluation.bootstrap_interval",
    CELLS,
    **NONE,
    range="any number is one",
    negative="any number is one",
)
_e.refuses(
    "shape",
    "values [1, 2]",
    lambda _: e.bootstrap_interval([[1, 2]], 0),
    "got shape [1, 2]",
    "expected finite values [P]",
)
_e.refuses("dtype", "texts", lambda _: e.bootstrap_interval(["a"], 0), "'a'", "float")
_e.refuses(
    "non-finite",
    "NaN",
    lambda _: e.bootstrap_interval([NAN], 0),
    "1 that are not finite",
    "expected finite values [P]",
)
_e.refuses("empty", "nothing", lambda _: e.bootstrap_interval([], 0), "got shape [0]", "P >= 1")
_e.refuses(
    "option",
    "level=95",
    lambda _: e.bootstrap_interval([1, 2], 0, level=95),
    "got 95",
    "such as 0.95",
)
_e.refuses(
    "option",
    "n=0",
    lambda _: e.bootstrap_interval([1, 2], 0, n=0),
    "got 0",
    "resamples of 1 or more",
)

_e = Entry(
    "evaluation.paired_bootstrap",
    CELLS,
    **NONE,
    range="any number is one",
    negative="any number is one",
)
_e.refuses(
    "shape",
    "2 and 3 values",
    lambda _: e.paired_bootstrap([1, 2], [1, 2, 3], 0),
    "got 2 and 3",
    "use bootstrap_interval on each",
)
_e.refuses("dtype", "texts", lambda _: e.paired_bootstrap(["a"], [1], 0), "'a'", "float")
_e.refuses(
    "non-finite",
    "infinity",
    lambda _: e.paired_bootstrap([float("inf")], [1], 0),
    "1 that are not finite",
    "expected finite values [P]",
)
_e.refuses("empty", "nothing", lambda _: e.paired_bootstrap([], [], 0), "got shape [0]", "P >= 1")
_e.refuses(
    "option",
    "level=0",
    lambda _: e.paired_bootstrap([1, 2], [0, 1], 0, level=0),
    "got 0",
    "such as 0.95",
)

_e = Entry(
    "evaluation.paired_bootstrap_of_runs",
    CELLS,
    **NONE,
    range="any number is one",
    negative="any number is one",
)
_e.refuses(
    "shape",
    "2 runs and 1",
    lambda _: e.paired_bootstrap_of_runs([[1], [2]], [[1]], 0),
    "got 2 and 1",
    "as many runs of each",
)
_e.refuses(
    "shape",
    "a run of 2 and 3 values",
    lambda _: e.paired_bootstrap_of_runs([[1, 2]], [[1, 2, 3]], 0),
    "got 2 and 3",
    "compare runs on the same problems",
)
_e.refuses(
    "dtype", "texts", lambda _: e.paired_bootstrap_of_runs([["a"]], [[1]], 0), "'a'", "float"
)
_e.refuses(
    "non-finite",
    "infinity",
    lambda _: e.paired_bootstrap_of_runs([[float("inf")]], [[1]], 0),
    "1 that are not finite",
    "expected finite values [P]",
)
_e.refuses(
    "empty",
    "no runs",
    lambda _: e.paired_bootstrap_of_runs([], [], 0),
    "got 0 and 0",
    "one or more",
)
_e.refuses(
    "option",
    "level=0",
    lambda _: e.paired_bootstrap_of_runs([[1, 2]], [[0, 1]], 0, level=0),
    "got 0",
    "such as 0.95",
)

_e = Entry(
    "evaluation.binomial_interval", CELLS, **NONE, shape="takes counts", dtype="takes counts"
)
_e.refuses("range", "5 of 4", lambda _: e.binomial_interval(5, 4), "got 5 of 4", "<= trials")
_e.refuses(
    "negative", "-1 of 4", lambda _: e.binomial_interval(-1, 4), "got -1 of 4", "0 <= successes"
)
_e.refuses(
    "non-finite",
    "NaN of 4",
    lambda _: e.binomial_interval(NAN, 4),
    "got nan of 4",
    "0 <= successes",
)
_e.refuses("empty", "0 of 0", lambda _: e.binomial_interval(0, 0), "got 0 of 0", "trials > 0")
_e.refuses(
    "option", "level=2", lambda _: e.binomial_interval(1, 4, level=2), "got 2", "such as 0.95"
)

_e = Entry("evaluation.locate_accuracy", CELLS, **NONE, option="has none")
_e.refuses(
    "shape",
    "2 traces and 1 error",
    lambda _: e.locate_accuracy([[1.0], [2.0]], [0]),
    "got 2 traces and 1",
    "one error step per trace",
)
_e.refuses("dtype", "texts", lambda _: e.locate_accuracy([["a"]], [0]), "'a'", "float")
_e.refuses(
    "range",
    "an error past the steps",
    lambda _: e.locate_accuracy([[1.0, 2.0]], [2]),
    "got 2",
    "leave out traces without an error",
)
_e.refuses(
    "negative",
    "an error of -1",
    lambda _: e.locate_accuracy([[1.0, 2.0]], [-1]),
    "got -1",
    "leave out traces without an error",
)
_e.refuses(
    "non-finite",
    "a score of NaN",
    lambda _: e.locate_accuracy([[NAN, 2.0]], [0]),
    "scores [nan, 2.0]",
    "expected finite scores",
)
_e.refuses(
    "empty", "no traces", lambda _: e.locate_accuracy([], []), "got 0 traces", "at least one trace"
)

_e = Entry("evaluation.calibration.reliability", CELLS, **NONE)
_e.refuses(
    "shape", "2 and 1", lambda _: reliability([0.5, 0.5], [1]), "to 0.5, 1 and 10", "as many labels"
)
_e.refuses("dtype", "texts", lambda _: reliability(["a"], [1]), "'a'", "float")
_e.refuses(
    "range",
    "a probability of 1.5",
    lambda _: reliability([1.5], [1]),
    "got 1 from 1.5",
    "probabilities in [0, 1]",
)
_e.refuses(
    "negative",
    "a probability of -0.5",
    lambda _: reliability([-0.5], [1]),
    "got 1 from -0.5",
    "probabilities in [0, 1]",
)
_e.refuses(
    "non-finite",
    "NaN",
    lambda _: reliability([NAN], [1]),
    "got 1 from nan",
    "probabilities in [0, 1]",
)
_e.refuses("empty", "nothing", lambda _: reliability([], []), "got 0", "as many labels")
_e.refuses("option", "bins=0", lambda _: reliability([0.5], [1], bins=0), "and 0", "a bin or more")

_e = Entry(
    "evaluation.separation.pooled_auc",
    CELLS,
    **NONE,
    option="has none",
    range="as evaluation.auc",
    negative="as evaluation.auc",
)
_e.refuses(
    "shape",
    "2 scores and 1 prompt",
    lambda _: pooled_auc([1.0, 2.0], [1, 0], [0], 0),
    "got shapes [[2], [2]] and prompts [1]",
    "one value per trace",
)
_e.refuses("dtype", "texts", lambda _: pooled_auc(["a"], [1], [0], 0), "'a'", "float")
_e.refuses(
    "non-finite",
    "NaN",
    lambda _: pooled_auc([NAN, 1.0], [1, 0], [0, 0], 0),
    "got some that are not",
    "leave those traces out",
)
_e.refuses(
    "empty", "nothing", lambda _: pooled_auc([], [], [], 0), "[[0], [0]]", "one value per trace"
)

_e = Entry("evaluation.steps.best_threshold", CELLS, **NONE, option="has none")
_e.refuses(
    "shape",
    "2 traces and 3 labels",
    lambda _: best_threshold([[1.0], [2.0]], [-1, 0, 0]),
    "got 2 traces and 3",
    "one label per trace",
)
_e.refuses("dtype", "texts", lambda _: best_threshold([["a"], ["b"]], [-1, 0]), "'a'", "float")
_e.refuses(
    "range",
    "a label past the steps",
    lambda _: best_threshold([[1.0], [2.0]], [-1, 4]),
    "trace 1: received a label of 4",
    "the steps count from 0",
)
_e.refuses(
    "negative",
    "a label of -2",
    lambda _: best_threshold([[1.0], [2.0]], [-2, 0]),
    "trace 0: received a label of -2",
    "the steps count from 0",
)
_e.refuses(
    "non-finite",
    "NaN",
    lambda _: best_threshold([[NAN], [2.0]], [-1, 0]),
    "trace 0: received scores of [nan]",
    "leave it out",
)
_e.refuses(
    "empty",
    "traces of one kind",
    lambda _: best_threshold([[1.0]], [-1]),
    "got one kind only",
    "traces without one",
)

_e = Entry(
    "evaluation.steps.first_error",
    CELLS,
    **NONE,
    option="has none",
    dtype="takes any integers",
    non_finite="takes integers",
    range="compares alone",
    negative="-1 says that there is none",
)
_e.refuses(
    "shape",
    "2 and 1",
    lambda _: first_error([1, 2], [1]),
    "got (2,) and (1,)",
    "one prediction per label",
)
_e.refuses(
    "empty", "nothing", lambda _: first_error([], []), "got (0,)", "one prediction per label"
)
