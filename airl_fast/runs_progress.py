"""One progress bar per run of several that go on at once in other processes."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from airl_fast.config import RunConfig
from airl_fast.jobs import StoppedError

_EVERY = 0.5  # seconds between looks at the metrics
_LINES_EVERY = 20  # looks between lines, where there is no terminal


class RunsProgress:
    """Follows runs by the metrics that they write, until the block ends.

    On a terminal, bars; elsewhere, every ten seconds a line for every run that has moved.

    Args:
        hide_done: take the bars of finished runs away.
    """

    def __init__(self, *, hide_done: bool = False) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description:>28}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            disable=not sys.stdout.isatty(),
        )
        self.hide_done = hide_done
        self._followed: list[tuple[Any, str, RunConfig | None, Future[Any]]] = []
        self._said: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> RunsProgress:
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look(say=False)
        self._bars.stop()

    def follow(self, name: str, config: RunConfig, future: Future[Any]) -> Future[Any]:
        """Show a training run's steps; return its future."""
        bar = self._bars.add_task(name, total=config.total_steps, note="waiting")
        self._followed.append((bar, name, config, future))
        return future

    def wait(self, name: str, future: Future[Any]) -> Future[Any]:
        """Show that a job without steps is waiting, running or done; return its future."""
        bar = self._bars.add_task(name, total=1, note="waiting")
        self._followed.append((bar, name, None, future))
        return future

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, highlight=False, soft_wrap=True)

    def _watch(self) -> None:
        looks = 0
        while not self._stop.wait(_EVERY):
            looks += 1
            self._look(say=self._bars.disable and looks % _LINES_EVERY == 0)

    def _look(self, say: bool) -> None:
        for bar, name, config, future in list(self._followed):
            done, note = _state(config, future)
            visible = not (self.hide_done and future.done())
            self._bars.update(bar, completed=done, note=note, visible=visible)
            if self._bars.disable and (future.done() or (say and future.running())):
                line = f"{name}: {done}/{config.total_steps if config else 1} {note}"
                if self._said.get(name) != line:
                    print(line, flush=True)
                self._said[name] = line


def _state(config: RunConfig | None, future: Future[Any]) -> tuple[int, str]:
    """Steps that are done, and how the run stands."""
    error = future.exception() if future.done() else None
    if future.done() and error is None:
        return config.total_steps if config else 1, "done"
    steps, note = 0, "running" if future.running() else "waiting"
    if config and (path := Path(config.run.output_dir) / "metrics.jsonl").exists():
        lines = path.read_text().split("\n")
        complete = [line for line in lines[:-1] if line]  # the last piece may be half-written
        if complete:
            steps, note = len(complete), _note(json.loads(complete[-1]))
    if error is not None:
        note = "stopped" if isinstance(error, StoppedError) else "failed"
    return steps, note


def _note(metrics: dict[str, Any]) -> str:
    shown = {
        "policy/logp": "log pi",
        "reward/mean": "reward",
        "disc/accuracy": "D accuracy",
    }
    values = [f"{label} {metrics[key]:.3f}" for key, label in shown.items() if key in metrics]
    return f"{metrics['phase']}: " + ", ".join(values)
