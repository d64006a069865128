"""When to say that a step of a trace deviates, and how sure to be.

    K steps of a trace   M traces that it was fitted on (calibrating.py)

A trace is decided by one value per step and a threshold t: the ``first`` step below t, or the
``lowest`` if it is below t; otherwise no step. A label is the 0-based first wrong step, or -1 (as
in ProcessBench). Value, rule and t are those of the highest F1 there: the harmonic mean of the
accuracies on traces with and without an error.

The confidence that a decision is right is logistic in its distance to t, and never falls with it
(Platt 1999), with one curve for located steps and one for none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from airl_fast.parsing import parse_object, shown

Array = NDArray[np.float64]
Value = Literal["f", "f per token", "centred f", "centred f per token"]
Rule = Literal["first", "lowest"]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)  # of what is read; see Calibration.load


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Probability of being right at a distance d >= 0 to the threshold: sigmoid(a + b d), b >= 0.

    d is in units of the values' spread, ``Calibration.scale``.
    """

    __pydantic_config__: ClassVar = _STRICT

    a: float
    b: float

    def __call__(self, distance: float) -> float:
        """The probability at one distance."""
        return float(sigmoid(np.array(self.a + self.b * distance)))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well decisions and their confidence agree with labels.

    Attributes:
        f1: harmonic mean of the two accuracies.
        accuracy_erroneous: decisions that name the first wrong step, among traces with one.
        accuracy_correct: decisions that name none, among traces without an error.
        calibration_error: mean distance between confidence and accuracy, over ten bins of equally
            many traces.
        brier: mean squared distance between confidence and being right.
    """

    __pydantic_config__: ClassVar = _STRICT

    f1: float
    accuracy_erroneous: float
    accuracy_correct: float
    calibration_error: float
    brier: float


@dataclass(frozen=True, kw_only=True)
class Decider:
    """Says which step of a trace deviates, if any, and how sure that is.

    Attributes:
        value: what of a step is compared: its f, or that per token, or either less the median over
            the trace's steps.
        rule: the ``first`` step below the threshold, or the ``lowest`` if it is below.
        threshold: in units of the value.
        scale: spread of the value, in which the curves take distances.
        located: confidence that a located step is the first wrong one.
        none: confidence that there is none where none is located.
    """

    __pydantic_config__: ClassVar = _STRICT

    value: Value
    rule: Rule
    threshold: float
    scale: float
    located: Curve
    none: Curve

    def decide(
        self, f: Sequence[float], num_tokens: Sequence[int]
    ) -> tuple[int | None, float, tuple[float, ...]]:
        """Decide one trace.

        Args:
            f: of each of the K steps.
            num_tokens: of each.

        Returns:
            The located step or None, the confidence in that, and the K values compared.
        """
        values = step_values(self.value, f, num_tokens)
        step, distance = self.placed(values)
        curve = self.none if step is None else self.located
        return step, curve(distance / self.scale), tuple(values.tolist())

    def placed(self, values: Array) -> tuple[int | None, float]:
        """The located step or None, and its (or the lowest) value's distance to the threshold."""
        below = np.flatnonzero(values < self.threshold)
        if not below.size:
            return None, float(values.min() - self.threshold)
        step = int(below[0]) if self.rule == "first" else int(values.argmin())
        return step, float(self.threshold - values[step])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How ``locate`` decides. Made by ``calibrate``, kept beside the reward as calibration.json.

    Attributes:
        decider: what was chosen.
        traces: M.
        erroneous: how many of them have an error.
        fitted: on the traces that everything was chosen on: too good.
        held_out: by cross-validation: what to expect of traces of the same kind.
        folds: of the cross-validation.
        seed: of the folds.
        weights: digest of the reward's head, to know a calibration of another reward.
    """

    __pydantic_config__: ClassVar = _STRICT

    decider: Decider
    traces: int
    erroneous: int
    fitted: Quality
    held_out: Quality
    folds: int
    seed: int
    weights: str = ""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n")

    def summary(self) -> str:
        """What was chosen and what it is worth, in a few lines."""
        chosen, found = self.decider, self.held_out
        return (
            f"{self.traces} traces, {self.erroneous} with an error\n"
            f"the {chosen.rule} step whose {chosen.value} is below {chosen.threshold:.4g}\n"
            f"F1 {found.f1:.3f} (with an error {found.accuracy_erroneous:.3f}, without "
            f"{found.accuracy_correct:.3f}), confidence off by {found.calibration_error:.3f} "
            f"(Brier {found.brier:.3f}), in {self.folds}-fold cross-validation\n"
            f"F1 {self.fitted.f1:.3f} on the traces that it was chosen on"
        )

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = parse_object(path.read_text("utf-8"))
            if values.pop("format") != 1:
                raise ValueError("another format")
            made = _CHECKED.validate_json(json.dumps(values), strict=True)
            if made.decider.scale > 0:
                return made
            reason = f"decider.scale: expected above 0, received {made.decider.scale}"
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where, why = ".".join(map(str, first["loc"])), first["msg"]
            reason = f"{where}: {why}, received {shown(first['input'])}"
        except (ValueError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is no calibration ({reason}): make it again with `airl-fast calibrate`, or "
            "remove it"
        )


_CHECKED = TypeAdapter(Calibration)


def step_values(value: Value, f: Sequence[float], num_tokens: Sequence[int]) -> Array:
    """What is compared with the threshold, [K] float64."""
    values = np.asarray(f, np.float64)
    if value.endswith("per token"):
        values = values / np.asarray(num_tokens, np.float64)
    return values - np.median(values) if value.startswith("centred") else values


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -z)))
