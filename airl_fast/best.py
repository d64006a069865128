"""The checkpoint with the best validation figure: which it is, and that it stays.

The figure is pass@1 on the validation problems; of equal ones the earlier counts. Evaluations
within the warm starts do not: the reward is not learned yet. ``best.json`` in the run's folder
names the checkpoint, and can be made again from metrics.jsonl, so that a kill between the two
writes loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airl_fast.durable import explained, write_text

METRIC = "valid/pass@1"
_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """A step that was evaluated, and its figure."""

    step: int
    value: float
    metric: str = METRIC


class BestSoFar:
    """Follows a run's evaluations.

    Args:
        folder: of the run.
        after: steps of the warm starts, whose evaluations do not count.

    Attributes:
        best: the best evaluation that has a checkpoint; None before the first.
    """

    def __init__(self, folder: Path, *, after: int) -> None:
        self.path = folder / _FILE
        self.after = after
        self.best: Best | None = None
        self._next: Best | None = None

    @property
    def protected(self) -> tuple[int, ...]:
        """The step whose checkpoint stays, if there is one."""
        return (self.best.step,) if self.best else ()

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a step has the best figure so far, so that its checkpoint has to be written."""
        found = self._figure(metrics)
        if found is None or (self.best is not None and found.value <= self.best.value):
            return False
        self._next = found
        return True

    def saved(self, step: int) -> None:
        """The checkpoint of a step is in place; if it is the best, best.json says so.

        Raises:
            WriteError: it cannot be written.
        """
        if self._next is not None and self._next.step == step:
            self._set(self._next)
        self._next = None

    def restore(self, history: Sequence[Mapping[str, Any]], steps: Collection[int]) -> None:
        """Start from the metrics of the steps that a run goes on from.

        Args:
            history: metrics of the finished steps, in order.
            steps: those that have a checkpoint. (The best has one, but where the run fell back
                behind a damaged checkpoint: what followed is made, and judged, again.)

        Raises:
            WriteError: best.json cannot be written or deleted.
        """
        figures = [self._figure(metrics) for metrics in history]
        kept = [figure for figure in figures if figure is not None and figure.step in steps]
        self._next = None
        self._set(max(kept, key=lambda figure: (figure.value, -figure.step), default=None))

    def _figure(self, metrics: Mapping[str, Any]) -> Best | None:
        if METRIC not in metrics or metrics["step"] <= self.after:
            return None
        return Best(metrics["step"], metrics[METRIC])

    def _set(self, best: Best | None) -> None:
        self.best = best
        with explained(str(self.path)):
            if best is None:
                self.path.unlink(missing_ok=True)
                return
            text = json.dumps(asdict(best)) + "\n"
            if not self.path.exists() or self.path.read_bytes() != text.encode():
                write_text(self.path, text)


def read_best(folder: Path) -> Best:
    """Which checkpoint of a run is the best.

    Raises:
        ValueError: the run was not evaluated after its warm starts, or the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: the run was not evaluated after its warm starts "
            "(run.eval_every, task.validation), so no checkpoint is the best; give --checkpoint "
            "last or a step"
        )
    try:
        values = json.loads(path.read_text("utf-8"))
        return Best(int(values["step"]), float(values["value"]), str(values["metric"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): delete it and give the run's `airl-fast train` "
            "command again, which writes it from metrics.jsonl"
        ) from error
