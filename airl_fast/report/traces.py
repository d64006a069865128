"""Scored traces as the viewer shows them: steps and tokens, their values, and colour scales."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from airl_fast.parsing import shown
from airl_fast.scores import Scored

SHADES = 4  # on either side of the neutral colour
LABELS = {"f": "f", "logp": "log π", "reward": "reward f − log π"}
Values = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token: the characters that it adds, possibly none, and its value by measure."""

    text: str
    values: Values


@dataclass(frozen=True, kw_only=True)
class StepView:
    """A step: its text, its value by measure ("f", "logp", "reward"), and the tokens it is made of.

    The tokens spell the text; a step without tokens is shown whole. Tokens without values (no
    measure) are shown plainly.
    """

    text: str
    values: Values
    tokens: Sequence[Piece] = ()

    def __post_init__(self) -> None:
        if self.tokens and "".join(token.text for token in self.tokens) != self.text:
            raise ValueError(
                f"step {shown(self.text)}: expected tokens that spell it, got "
                f"{[token.text for token in self.tokens]}"
            )


@dataclass(frozen=True, kw_only=True)
class TraceView:
    """One completion.

    Attributes:
        title: names it in the list.
        steps: in order, one or more.
        values: of the whole completion, by measure; may be empty.
        prompt: shown above it.
        correct: whether it is right, where that is known.
        error_step: 0-based index of the step that is known to be the first wrong one.
        located: 0-based index of the step that a reward takes for it.
        group: traces of one group answer one prompt.
        source: where it is from, such as "expert", "policy" or "perturbed".
    """

    title: str
    steps: Sequence[StepView]
    values: Values = field(default_factory=dict)
    prompt: str = ""
    correct: bool | None = None
    error_step: int | None = None
    located: int | None = None
    group: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"trace {shown(self.title)}: expected one step or more, got none")
        for name, step in (("error_step", self.error_step), ("located", self.located)):
            if step is not None and not 0 <= step < len(self.steps):
                raise ValueError(
                    f"trace {shown(self.title)}: expected {name} in [0, {len(self.steps)}), the "
                    f"0-based index of a step, got {step}; None stands for no error"
                )
        numbers = [self.values, *(step.values for step in self.steps)]
        numbers += [token.values for step in self.steps for token in step.tokens]
        if not all(math.isfinite(v) for values in numbers for v in values.values()):
            raise ValueError(f"trace {shown(self.title)}: expected finite values")

    @classmethod
    def from_scored(
        cls,
        scored: Scored,
        *,
        title: str,
        prompt: str = "",
        correct: bool | None = None,
        error_step: int | None = None,
        located: int | None = None,
        group: str = "",
        source: str = "",
    ) -> TraceView:
        """Build a trace from a scorer's result.

        log pi of a step and of the whole is f - reward: as the reward counts it. A character that
        several tokens claim is shown with the first of them, and what is between two steps with
        the second.

        Raises:
            ValueError: steps or tokens that do not lie in the text, or an index out of range.
        """
        if not scored.steps:
            raise ValueError(f"trace {shown(title)}: expected one step or more, got none")
        ends = [*(step.end for step in scored.steps[:-1]), len(scored.text)]
        if ends != sorted(ends):
            raise ValueError(f"trace {shown(title)}: expected steps in order, got ends {ends}")
        tokens: list[list[Piece]] = [[] for _ in ends]
        for step, piece in _pieces(scored, ends):
            tokens[step].append(piece)
        starts = [0, *ends[:-1]]
        return cls(
            title=title,
            steps=[
                StepView(
                    text=scored.text[start:end],
                    values=_values(step.f, step.reward),
                    tokens=pieces,
                )
                for start, end, step, pieces in zip(starts, ends, scored.steps, tokens, strict=True)
            ],
            values=_values(scored.f, scored.reward),
            prompt=prompt,
            correct=correct,
            error_step=error_step,
            located=located,
            group=group,
            source=source,
        )

    def lowest(self, measure: str) -> int:
        """The step with the lowest value; the first of equals."""
        values = [step.values[measure] for step in self.steps]
        return values.index(min(values))


@dataclass(frozen=True)
class Scale:
    """Colours of one measure at one level: nine shades around ``centre``, full at ``limit``.

    ``limit`` is the 95th percentile of the distance to the centre, so that one outlier does not
    fade the rest.
    """

    centre: float
    limit: float
    decimals: int

    @classmethod
    def of(cls, values: Sequence[float], centre: float | None) -> Scale:
        """Scale of some values; without a centre, around their median."""
        if not values:
            return cls(0.0, 1.0, 3)
        middle = float(np.median(values)) if centre is None else centre
        limit = float(np.percentile(np.abs(np.asarray(values) - middle), 95)) or 1.0
        return cls(middle, limit, min(9, max(0, 3 - math.floor(math.log10(limit)))))

    def shade(self, value: float) -> int:
        """The shade of a value, from -4 (lowest) through 0 to 4."""
        share = max(-1.0, min(1.0, (value - self.centre) / self.limit))
        return math.floor(share * SHADES + 0.5)

    def show(self, value: float) -> str:
        """A value in as many digits as the scale asks for."""
        return f"{value:.{self.decimals}f}"


@dataclass(frozen=True, kw_only=True)
class TraceSet:
    """Traces in one viewer, on common scales.

    Attributes:
        title: of the viewer.
        traces: all with the same measures.
        centres: the neutral value of a measure; a measure without one has the median of all
            steps, or of all tokens.
        note: shown under the viewer.
    """

    title: str
    traces: Sequence[TraceView]
    centres: Values = field(default_factory=lambda: {"reward": 0.0})
    note: str = ""

    def __post_init__(self) -> None:
        if not self.traces:
            raise ValueError(f"traces {shown(self.title)}: expected one or more; leave the set out")
        for trace in self.traces:
            for step in trace.steps:
                for values in (step.values, *(t.values for t in step.tokens if t.values)):
                    if values.keys() != set(self.measures):
                        raise ValueError(
                            f"trace {shown(trace.title)}: expected the values "
                            f"{list(self.measures)} everywhere, as the first step has, got "
                            f"{list(values)}; score all traces alike"
                        )
        if not self.measures:
            raise ValueError(
                f"traces {shown(self.title)}: expected a value of every step, got none"
            )

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the values, such as "f"."""
        return tuple(self.traces[0].steps[0].values)

    @property
    def has_tokens(self) -> bool:
        """Whether there is a token to show."""
        return any(step.tokens for trace in self.traces for step in trace.steps)

    def scale(self, measure: str, level: str) -> Scale:
        """Colours of a measure at the level of "steps" or "tokens"."""
        steps = [step for trace in self.traces for step in trace.steps]
        parts = steps if level == "steps" else [t for step in steps for t in step.tokens]
        values = [part.values[measure] for part in parts if part.values]
        return Scale.of(values, self.centres.get(measure))


def _values(f: float, reward: float | None) -> dict[str, float]:
    return {"f": f} if reward is None else {"f": f, "logp": f - reward, "reward": reward}


def _pieces(scored: Scored, ends: Sequence[int]) -> Iterator[tuple[int, Piece]]:
    """Every token with its step, cut where a step ends in it, and plain text between tokens.

    A token without characters of its own is of the step that has just ended.
    """
    text, tokens, shown = scored.text, scored.tokens, 0
    columns = {"f": tokens.f, "logp": tokens.logp, "reward": tokens.reward}
    known = {name: column for name, column in columns.items() if column is not None}

    def cut(first: int, last: int, values: Values) -> Iterator[tuple[int, Piece]]:
        while first < last:
            step = bisect_right(ends, first)
            end = min(last, ends[step])
            yield step, Piece(text=text[first:end], values=values)
            first = end

    for i, (start, end) in enumerate(tokens.offsets):
        if not 0 <= start <= end <= len(text):
            raise ValueError(f"token {i}: expected offsets in [0, {len(text)}], got {start, end}")
        values = {name: column[i] for name, column in known.items()}
        yield from cut(shown, start, {})
        own = max(start, shown)
        if own < end:
            yield from cut(own, end, values)
        else:
            yield bisect_left(ends, own), Piece(text="", values=values)
        shown = max(shown, end)
    yield from cut(shown, len(text), {})
