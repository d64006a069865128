"""The folder of a run: its configuration, its metrics and its checkpoints.

- config.yaml: what was run
- metrics.jsonl: one JSON object per step
- checkpoints/: the last few, see checkpoint.py
- policy/, reward/: the final weights
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from airl_fast.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from airl_fast.config import RunConfig, load_config, save_config

# What may differ between a run and its continuation: nothing that the weights depend on, but for
# the order in which another number of threads adds up.
_FREE = {"output_dir", "resume", "checkpoint_every", "keep_checkpoints", "threads"}


class RunFolder:
    """Where a run writes, and what an interrupted one left there."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.run.output_dir)
        self.policy = self.path / "policy"
        self.reward = self.path / "reward"
        self._checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"

    def open(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Make the folder; return the last checkpoint where the run is to go on from one.

        Raises:
            ValueError: the folder holds a run that ``run.resume`` forbids to continue, or one of
                another configuration (the keys are named), or none where one must be. More steps
                are another configuration unless policy.final_lr_fraction=1.
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
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.path / "config.yaml")
            self._metrics.write_text("")
            return None
        tensors, state = load_checkpoint(latest)
        self._check_same(state["config"])
        if state["step"] > self.config.total_steps:
            raise ValueError(
                f"{self.path} holds {state['step']} finished steps, and run.steps="
                f"{self.config.run.steps} asks for {self.config.total_steps} in all: raise "
                "run.steps, or choose another run.output_dir"
            )
        self._forget_after(state["step"])
        save_config(self.config, self.path / "config.yaml")
        return tensors, state

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Every step's metrics so far."""
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint after ``step`` finished steps."""
        with self._metrics.open("a") as file:
            os.fsync(file.fileno())
        full = {**state, "step": step, "config": asdict(self.config)}
        keep = self.config.run.keep_checkpoints
        save_checkpoint(self._checkpoints, step, tensors, _jsonable(full), keep=keep)

    def _forget_after(self, step: int) -> None:
        """Drop metrics of steps that are about to be run again.

        What follows the last line of a finished step may be half-written: it is not read.
        """
        kept = []
        for line in self._metrics.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        partial = self._metrics.with_suffix(".tmp")
        partial.write_text("".join(kept))
        os.replace(partial, self._metrics)

    def _check_same(self, saved: dict[str, Any]) -> None:
        now = _jsonable(asdict(self.config))
        # A cosine depends on where it ends: the steps already made would have been others.
        constant = self.config.policy.final_lr_fraction == 1
        free = _FREE | {"steps"} if constant else _FREE
        changed = [
            f"{section}.{key} ({saved[section].get(key)!r} -> {value!r})"
            for section, values in now.items()
            for key, value in values.items()
            if not (section == "run" and key in free) and saved[section].get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run of another configuration; it differs in "
                f"{', '.join(changed)}: choose another run.output_dir, or restore the values"
            )


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))
