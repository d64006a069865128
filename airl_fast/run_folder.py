"""The folder of a run: its configuration, its metrics and its checkpoints.

- config.yaml: what was run
- metrics.jsonl: one JSON object per step
- checkpoints/: the last few and the best, see checkpoint.py
- best.json: which one is the best, see best.py
- policy/, reward/: the final weights
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from airl_fast.best import BestSoFar
from airl_fast.checkpoint import (
    checkpoint_steps,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from airl_fast.config import RunConfig, load_config, save_config
from airl_fast.discriminator import Discriminator
from airl_fast.distributed import World
from airl_fast.durable import explained, flush, make_folder, sweep, whole_folder, write_text
from airl_fast.parsing import parse_object, shown
from airl_fast.policy import Policy
from airl_fast.tasks import Task

# What may differ between a run and its continuation: nothing that the weights depend on, but for
# the order in which another number of threads adds up; and the guards, so that a run that one
# stopped can go on past it.
_FREE = {
    "output_dir",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "threads",
    "gradient_checkpointing",
}


class RunFolder:
    """Where a run writes, and what an interrupted one left there."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        warm = config.sft_steps + config.warmup_steps
        self.path = Path(config.run.output_dir)
        self.policy = self.path / "policy"
        self.reward = self.path / "reward"
        self._checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"
        self.best = BestSoFar(self.path, after=0 if config.algorithm.name == "sft" else warm)

    def open(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Make the folder; return the last checkpoint where the run is to go on from one.

        Raises:
            ValueError: the folder holds a run that ``run.resume`` forbids to continue, or one of
                another configuration (the keys are named), or none where one must be; or metrics
                of finished steps are gone. More steps are another configuration unless
                the rates of policy and discriminator are constant (final_lr_fraction=1).
            WriteError: the folder cannot be written to.
            CheckpointError: there are checkpoints and all of them are damaged.
        """
        resume = self.config.run.resume
        used = self._metrics.exists() or self._checkpoints.exists()
        if resume == "never" and used:
            raise ValueError(
                f"{self.path} already holds a run and run.resume=never: choose another "
                "run.output_dir, delete the folder, or set run.resume=auto"
            )
        latest = latest_checkpoint(self._checkpoints) if self._checkpoints.exists() else None
        if latest is None:
            if resume == "must":
                raise ValueError(
                    f"{self.path} holds no checkpoint and run.resume=must: set run.resume=auto to "
                    "start a new one"
                )
            if used and (self.path / "config.yaml").exists():
                self._check_same(_jsonable(asdict(load_config(self.path / "config.yaml"))))
            self._write("")
            self.best.restore([], ())
            return None
        tensors, state = load_checkpoint(latest)
        saved, step = state.get("config"), state.get("step")
        if not isinstance(saved, dict) or not isinstance(step, int):
            raise ValueError(
                f"{latest} has no configuration or no step: it is no checkpoint of a run; delete "
                "it, or restore it from a copy"
            )
        self._check_same(saved)
        if state["step"] > self.config.total_steps:
            raise ValueError(
                f"{self.path} holds {state['step']} finished steps, and run.steps="
                f"{self.config.run.steps} asks for {self.config.total_steps} in all: raise "
                "run.steps, or choose another run.output_dir"
            )
        kept = self._lines(state["step"])
        self._write("".join(kept))
        history = [json.loads(line) for line in kept]
        self.best.restore(history, checkpoint_steps(self._checkpoints))
        return tensors, state

    def open_together(self, world: World) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """``open`` by rank 0 of several processes; the others read what it found.

        Raises:
            ValueError: as ``open``, on every process; or they do not see the same folder.
        """
        mine: list[Any] = []

        def open_first() -> int | None:
            mine.append(self.open())
            return None if mine[0] is None else int(mine[0][1]["step"])

        step = world.first_does(open_first)
        if step is not None and not world.first:
            latest = latest_checkpoint(self._checkpoints)
            mine.append(load_checkpoint(latest) if latest is not None else None)
        seen = world.gather(mine[0][1]["step"] if mine and mine[0] else None)
        if any(other != step for other in seen):
            raise ValueError(
                f"rank 0 goes on from step {step} in {self.path}, and the processes find {seen} "
                "there: put run.output_dir where every machine sees the same files"
            )
        return mine[0] if mine else None

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics.

        Raises:
            WriteError: they cannot be written.
        """
        line = json.dumps(metrics) + "\n"
        with explained(str(self._metrics)), self._metrics.open("a") as file:
            file.write(line)

    def history(self) -> list[dict[str, Any]]:
        """Every step's metrics so far.

        Raises:
            ValueError: a line that is not the metrics of a step, with its number.
        """
        lines = self._metrics.read_text("utf-8").splitlines()
        return [_step_metrics(line, self._metrics, i) for i, line in enumerate(lines, start=1)]

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint after ``step`` finished steps; keep the last few and the best.

        Raises:
            WriteError, CheckpointError: something cannot be written; earlier checkpoints stay.
        """
        with explained(str(self._metrics)):
            flush(self._metrics)
        full = _jsonable({**state, "step": step, "config": asdict(self.config)})
        folder, keep = self._checkpoints, self.config.run.keep_checkpoints
        old = self.best.protected
        save_checkpoint(folder, step, tensors, full, keep=keep, protect=old)
        self.best.saved(step)
        if self.best.protected != old:  # the one before is kept until best.json names the new one
            prune_checkpoints(folder, step, keep=keep, protect=self.best.protected)

    def _write(self, metrics: str) -> None:
        """Write what is there before the first step of a process."""
        with explained(str(self.path)):
            make_folder(self.path)
            for file in (self.path / "config.yaml", self._metrics, self.best.path):
                sweep(file)
            save_config(self.config, self.path / "config.yaml")
            write_text(self._metrics, metrics)

    def _lines(self, steps: int) -> list[str]:
        """The metrics of the first ``steps`` steps; later ones are about to be run again.

        What follows them may be half-written: it is not read.
        """
        text = self._metrics.read_text("utf-8", "replace") if self._metrics.exists() else ""
        kept = text.splitlines(keepends=True)[:steps]
        for step in range(1, steps + 1):
            line = kept[step - 1] if step <= len(kept) else ""
            try:
                found = parse_object(line)["step"] == step and line.endswith("\n")
            except (ValueError, LookupError):
                found = False
            if not found:
                raise ValueError(
                    f"{self._metrics}: line {step} is not the metrics of step {step}, and "
                    f"{steps} steps are finished: restore the file from a copy, or delete "
                    f"{self.path} to start again"
                )
        return kept

    def _check_same(self, saved: dict[str, Any]) -> None:
        now = _jsonable(asdict(self.config))
        # A cosine depends on where it ends: the steps already made would have been others.
        rates = [self.config.policy.final_lr_fraction]
        if self.config.algorithm.name == "airl":
            rates.append(self.config.discriminator.final_lr_fraction)
        constant = all(rate == 1 for rate in rates)
        free = _FREE | {"steps"} if constant else _FREE
        changed = [
            f"{section}.{key} ({shown(before.get(key))} -> {value!r})"
            for section, values in now.items()
            for before in [saved[section] if isinstance(saved.get(section), dict) else {}]
            for key, value in values.items()
            if section != "guards"
            and not (section == "run" and key in free)
            and before.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run of another configuration; it differs in "
                f"{', '.join(changed)}: choose another run.output_dir, or restore the values"
            )


def write_models(
    folder: Path, policy: Policy, discriminator: Discriminator | None, config: RunConfig, task: Task
) -> None:
    """Write ``folder``/policy and, where there is one, ``folder``/reward, each whole or not at all.

    Raises:
        WriteError: they cannot be written.
    """
    world = policy.world
    _write_whole(folder / "policy", world, policy.save)
    if discriminator is None:
        return
    training = {
        "granularity": config.algorithm.granularity,
        "interval": config.algorithm.interval,
        "boundary": task.step_boundary,
        "reward": config.algorithm.reward,
        "logit": config.discriminator.logit,
        "temperature": config.sampling.temperature,
        "task": task.name,
    }
    _write_whole(folder / "reward", world, partial(discriminator.save, training=training))


def _write_whole(final: Path, world: World, save: Callable[[Path], None]) -> None:
    """Let rank 0 write a folder whole; what keeps it from that is raised on all ranks.

    Args:
        final: the folder.
        world: the ranks.
        save: called by all of them: gathers the weights, then writes on rank 0.
    """
    failure: Exception | None = None
    with explained(str(final)), ExitStack() as place:
        made = world.first_does(lambda: place.enter_context(whole_folder(final)))
        try:
            save(made)
        except Exception as error:
            if not world.first:
                raise
            failure = error

        def finish() -> None:
            if failure is not None:
                raise failure
            place.close()

        world.first_does(finish)


def _step_metrics(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        metrics = parse_object(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}; restore the file from a copy") from None
    if not isinstance(metrics.get("step"), int):
        raise ValueError(f"{path}, line {number}: no number of a 'step'; it is no run's metrics")
    return metrics


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))
