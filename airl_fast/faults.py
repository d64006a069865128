"""A batch that made a value that is not finite, kept for inspection: RUN/faults/step-000123/.

- batch.safetensors: the traces and what was known of them, laid end to end with their lengths
- fault.json: what was wrong, and where
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from airl_fast.packing import Source, Trace

_BATCH, _REPORT = "batch.safetensors", "fault.json"
_VALUES = ("logp", "rewards", "advantages")
_TOKENS = ("prompt", "completion", "span_lengths")


@dataclass
class Batch:
    """What a step has seen so far.

    Attributes:
        traces: every trace of the step; what follows is of the first ones of them, and None where
            the step had not come so far.
        logp: log pi of every action, one tensor [len(completion)] per trace.
        rewards: of every span, before any clipping, one tensor [spans] per trace.
        advantages: of every action, one tensor [len(completion)] per trace.
    """

    traces: Sequence[Trace] = ()
    logp: Sequence[Tensor] | None = None
    rewards: Sequence[Tensor] | None = None
    advantages: Sequence[Tensor] | None = None

    def first_non_finite(self) -> tuple[str, int, int, str] | None:
        """Name, trace, position and value of the first value that is not finite."""
        for name in _VALUES:
            for i, values in enumerate(getattr(self, name) or ()):
                bad = (~values.isfinite()).nonzero()
                if len(bad):
                    at = int(bad[0])
                    return name, i, at, str(float(values[at]))
        return None


@dataclass
class Fault(Batch):
    """A batch read back, with the report of what was wrong.

    Attributes:
        report: ``step`` and ``phase`` as in the metrics, ``update`` (of which model), ``error``
            (the message) and, each null where it does not apply: ``tensor`` (what was not finite),
            ``trace`` (index into ``traces``), ``position`` (span or action of it), ``value``,
            ``parameter`` (the first whose gradient was not finite).
    """

    report: dict[str, Any] = field(default_factory=dict)


def save_fault(folder: Path, report: dict[str, Any], batch: Batch) -> None:
    """Write a fault's folder whole or not at all, replacing an earlier one of the same step.

    Raises:
        OSError: the folder cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    for name in _TOKENS:
        _put(tensors, name, [torch.tensor(getattr(trace, name)) for trace in batch.traces])
    tensors["group"] = torch.tensor([trace.group for trace in batch.traces])
    tensors["source"] = torch.tensor([int(trace.source) for trace in batch.traces])
    for name in _VALUES:
        values = getattr(batch, name)
        if values is not None:
            _put(tensors, name, [part.detach().cpu() for part in values])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / _BATCH)
    (partial / _REPORT).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def load_fault(folder: str | os.PathLike[str]) -> Fault:
    """Read what a guard left in ``RUN/faults/step-000123``.

    Returns:
        The batch as the step saw it, tensors on the CPU, and the report.

    Raises:
        FileNotFoundError: the folder is not one of a fault.
    """
    folder = Path(folder)
    report = json.loads((folder / _REPORT).read_text("utf-8"))
    tensors = load_file(folder / _BATCH)
    tokens = [[tuple(part.tolist()) for part in _get(tensors, name)] for name in _TOKENS]
    groups, sources = tensors["group"].tolist(), tensors["source"].tolist()
    traces = [
        Trace(prompt=prompt, completion=completion, span_lengths=spans, group=g, source=Source(s))
        for prompt, completion, spans, g, s in zip(*tokens, groups, sources, strict=True)
    ]
    values = {name: _get(tensors, name) for name in _VALUES if name in tensors}
    return Fault(traces=traces, report=report, **values)


def _put(tensors: dict[str, Tensor], name: str, parts: Sequence[Tensor]) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    tensors[name] = torch.cat(list(parts)) if parts else empty
    tensors[f"{name}.lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.int64)


def _get(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    return list(tensors[name].split(tensors[f"{name}.lengths"].tolist()))
