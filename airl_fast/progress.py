"""How a training run goes on, while it does: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_PHASES = {"sft": "warm start", "discriminator": "discriminator", "policy": "policy"}

# metric -> what it is called; a phase shows those of them that it has
_SHOWN = {
    "reward/mean": "reward",
    "disc/accuracy": "D acc",
    "policy/logp": "log pi",
    "policy/entropy": "entropy",
    "valid/pass@1": "pass@1",
    "valid/auc_f": "AUC f",
}
_KEPT = ("valid/pass@1", "valid/auc_f")  # measured now and then: shown until measured again


class TrainingProgress:
    """Shows every step of a run; give it to ``Trainer`` as ``on_step``, within ``with``.

    On a terminal, a bar with the phase, the step and the key metrics. Elsewhere a line at the
    first and the last step, at every change of phase, at every evaluation, and after at most
    ``seconds`` besides.

    Args:
        total: steps of the run (``RunConfig.total_steps``).
        console: where to write; rich's own (standard output) by default.
        seconds: longest silence between the lines of a log, if steps are shorter than that.
    """

    def __init__(
        self, total: int, *, console: Console | None = None, seconds: float = 10.0
    ) -> None:
        self.total = total
        self.console = console or Console()
        self.seconds = seconds
        self._values: dict[str, float] = {}
        self._phase = ""
        self._said = float("-inf")
        self._bar = Progress(
            TextColumn("{task.description:>13}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, note="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Show one step's metrics, as the trainer gives them."""
        step, phase = int(metrics["step"]), str(metrics["phase"])
        measured = any(key in metrics for key in _KEPT)
        self._values = {key: self._values[key] for key in _KEPT if key in self._values}
        self._values |= {key: metrics[key] for key in _SHOWN if key in metrics}
        note = ", ".join(f"{_SHOWN[key]} {self._values[key]:.3f}" for key in self._shown())
        name = _PHASES.get(phase, phase)
        self._bar.update(self._task, completed=step, description=name, note=note)
        now = time.monotonic()
        due = now - self._said >= self.seconds or phase != self._phase or measured
        self._phase = phase
        if self._bar.disable and (due or step == self.total):
            self._said = now
            seconds = float(metrics["seconds"])
            self.console.print(
                f"step {step}/{self.total}, {name}: {note} ({seconds:.2f} s a step)",
                soft_wrap=True,
                highlight=False,
            )

    def _shown(self) -> list[str]:
        return [key for key in _SHOWN if key in self._values]


def summary(history: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of a run: what every phase took, and the metrics at its end."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("phase")
    for name in ("steps", "seconds", *_SHOWN.values()):
        table.add_column(name, justify="right")
    for phase in dict.fromkeys(line["phase"] for line in history):
        lines = [line for line in history if line["phase"] == phase]
        seconds = sum(line["seconds"] for line in lines)
        cells = [str(len(lines)), f"{seconds:.1f}"]
        for key in _SHOWN:
            values = [line[key] for line in lines if key in line]
            cells.append(f"{values[-1]:.3f}" if values else "")
        table.add_row(_PHASES.get(phase, phase), *cells)
    return table
