"""Perturbed expert traces: close to an expert's, and wrong; negatives for the discriminator."""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

from airl_fast.packing import Source, Trace
from airl_fast.tasks.base import Task, other_digit, split_steps


def replace_digit(completion: str, boundary: str, rng: random.Random) -> str | None:
    """Replace one digit by another, anywhere; None if there is no digit."""
    places = [match.start() for match in re.finditer(r"[0-9]", completion)]
    return other_digit(completion, rng.choice(places), rng) if places else None


def swap_steps(completion: str, boundary: str, rng: random.Random) -> str | None:
    """Exchange two different complete steps; None if there are no two."""
    steps = split_steps(completion, boundary)
    complete = _complete(steps, boundary)
    pairs = [(i, j) for i in complete for j in complete if i < j and steps[i] != steps[j]]
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    steps[i], steps[j] = steps[j], steps[i]
    return "".join(steps)


def drop_step(completion: str, boundary: str, rng: random.Random) -> str | None:
    """Leave out one complete step that is not the whole text; None if there is none."""
    steps = split_steps(completion, boundary)
    complete = [i for i in _complete(steps, boundary) if steps[i].strip()]
    if not complete or len(steps) < 2:
        return None
    i = rng.choice(complete)
    return "".join(steps[:i] + steps[i + 1 :])


def _complete(steps: Sequence[str], boundary: str) -> list[int]:
    """Return the steps that end in a delimiter: others cannot be moved without gluing two."""
    return [i for i, step in enumerate(steps) if re.search(f"(?:{boundary})\\Z", step)]


_TEXT_LEVEL: dict[str, Callable[[str, str, random.Random], str | None]] = {
    "digit": replace_digit,
    "swap": swap_steps,
    "drop": drop_step,
}
KINDS = ("corrupt", *_TEXT_LEVEL)  # corrupt: the task's own, which plants one wrong step


def perturb(
    task: Task, completion: str, rng: random.Random, *, kinds: Sequence[str] = KINDS
) -> str:
    """Return a wrong version of an expert's trace, never the trace itself.

    The kinds are tried in random order until one applies: a text without digits or with a single
    step does not take them all.

    Args:
        task: gives ``corrupt`` and the delimiter of steps.
        completion: the expert's trace.
        rng: draws the kind and the place.
        kinds: the perturbations to draw from, evenly; see ``KINDS``.

    Raises:
        ValueError: an unknown kind, or a trace that none of the kinds can change: it has to be
            left out of the negatives, never labelled one unchanged.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds of perturbation {list(kinds)}; expected some of {list(KINDS)}")
    reasons = []
    for kind in rng.sample(list(kinds), len(kinds)):
        if kind == "corrupt":
            try:
                changed: str | None = task.corrupt(completion, rng)[0]
            except ValueError as error:
                changed = None
                reasons.append(str(error))
        else:
            changed = _TEXT_LEVEL[kind](completion, task.step_boundary, rng)
        if changed is not None and changed != completion:
            return changed
    detail = f" ({'; '.join(reasons)})" if reasons else ""
    raise ValueError(
        f"no perturbation among {', '.join(kinds)} changes the trace {completion[:80]!r}{detail}; "
        "leave it out, or set discriminator.perturbed_per_update=0"
    )


def told_apart(traces: Sequence[Trace], perturbed: Literal["all", "changed"]) -> list[list[bool]]:
    """Which spans of each trace a discriminator is taught with.

    Args:
        traces: of each perturbed one, the expert's of its group is among them.
        perturbed: of perturbed traces all spans, as of the others, or the first that is changed:
            those before it are the expert's own, and would be taught as both.
    """
    told = [[True] * len(trace.span_lengths) for trace in traces]
    if perturbed == "changed":
        experts = {trace.group: trace for trace in traces if trace.source == Source.EXPERT}
        for i, trace in enumerate(traces):
            if trace.source == Source.PERTURBED:
                changed = _changed_span(trace, experts[trace.group])
                told[i] = [span == changed for span in range(len(trace.span_lengths))]
    return told


def _changed_span(trace: Trace, expert: Trace) -> int:
    pairs = zip(trace.completion, expert.completion, strict=False)
    # Where one is how the other begins, they differ in where they end.
    end = min(len(expert.completion), len(trace.completion) - 1)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), end)
    return bisect_right(list(accumulate(trace.span_lengths)), place)
