"""Checkpoints that are written whole or not at all, and read back bit for bit. No pickle.

A checkpoint is a folder ``step-000020`` with ``tensors.safetensors``, ``state.json`` and
``manifest.json`` (the size and SHA-256 of the other two). It is written as
``step-000020.tmp-<pid>``, flushed to the disk, then renamed, so that a folder of the final name is
whole, at whatever moment a process is killed. One process writes to a directory at a time: with
several ranks, rank 0.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from airl_fast.distributed import place_like
from airl_fast.durable import (
    explained,
    flush,
    make_folder,
    move_into_place,
    remove,
    retire,
    temporary,
)
from airl_fast.parsing import parse_object, shown

_log = logging.getLogger(__name__)

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_FORMAT = 1
_FOLDER = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is damaged; the message names it and the remedy."""


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write one checkpoint atomically, then delete all but the newest ``keep``.

    Args:
        directory: where checkpoints live; made if it does not exist.
        step: the number of finished steps, >= 0. A checkpoint of the same step is replaced.
        tensors: dense tensors of any shape, dtype and device; no two may share memory.
        state: everything else, as JSON values: dicts with string keys, lists, strings, numbers,
            booleans, None. Floats come back exactly.
        keep: how many checkpoints stay, >= 1. The one just written always does.
        protect: steps whose checkpoints stay besides.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: a tensor or a value that would not come back as it was.
        CheckpointError: the folder cannot be written to (permissions, disk full). The checkpoints
            that were there are as they were.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step={step} and keep={keep}")
    _check_json(state, "state")
    text = json.dumps(state)
    dense = _dense(tensors)

    final = Path(directory) / f"step-{step:06d}"
    partial = temporary(final)
    try:
        with explained(f"the checkpoint {final}", CheckpointError):
            remove(partial)
            make_folder(partial)
            save_file(dense, partial / _TENSORS)
            (partial / _STATE).write_text(text, encoding="utf-8")
            files = {name: _fingerprint(partial / name) for name in (_TENSORS, _STATE)}
            manifest = {"format": _FORMAT, "step": step, "files": files}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for name in (_TENSORS, _STATE, _MANIFEST):
                flush(partial / name)
            flush(partial)
            move_into_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    prune_checkpoints(directory, step, keep=keep, protect=protect)
    return final


def prune_checkpoints(
    directory: Path, newest: int, *, keep: int, protect: Collection[int] = ()
) -> None:
    """Delete checkpoints but ``keep`` of them, and what earlier processes left unfinished.

    The checkpoint of step ``newest`` stays, then those before it, latest first, then those after
    it: steps that are being made again, because those checkpoints were damaged. What cannot be
    deleted is reported as a warning of the logger ``airl_fast.checkpoint``; the next call tries
    again.

    Args:
        directory: where the checkpoints are.
        newest: the step just written.
        keep: how many stay.
        protect: steps whose checkpoints stay besides.
    """
    found = {_step(path): path for path in _checkpoints(Path(directory))}
    ranked = sorted(found, key=lambda step: (step > newest, abs(newest - step)))
    try:
        for step in ranked[keep:]:
            if step not in protect:
                retire(found[step])
        for path in Path(directory).glob("step-*.tmp-*"):
            remove(path)
    except OSError as error:
        _log.warning("cannot delete old checkpoints: %s; delete them by hand", error)


def latest_checkpoint(directory: Path) -> Path | None:
    """Find the newest checkpoint that is whole.

    A damaged checkpoint is reported as a warning of the logger ``airl_fast.checkpoint``, with its
    name and what is wrong, and the one before it is tried. Half-written folders (killed while
    saving) are not checkpoints and are passed over.

    Returns:
        Its folder, or None when the directory holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    damaged = []
    for path in reversed(_checkpoints(Path(directory))):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s. Trying the checkpoint before it", error)
            damaged.append(path.name)
        else:
            return path
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged ({', '.join(damaged)}); delete them to "
            "start again from step 0, or restore one from a copy"
        )
    return None


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints that are there, whole or not, in order."""
    return [_step(path) for path in _checkpoints(Path(directory))]


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, after checking it against its manifest.

    Returns:
        The tensors, on the CPU, and the state, as they were given to ``save_checkpoint``.

    Raises:
        CheckpointError: the checkpoint is damaged or not there.
    """
    path = Path(path)
    verify_checkpoint(path)
    try:
        state = parse_object((path / _STATE).read_text(encoding="utf-8"))
        return load_file(path / _TENSORS), state
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {str(error)[:500]}") from error


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint against the sizes and SHA-256 in its manifest.

    Raises:
        CheckpointError: naming the checkpoint, the file and what differs.
    """
    path = Path(path)
    for name, (size, digest) in _read_manifest(path).items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            raise _damaged(path, f"{name} is missing")
        if found != size:
            raise _damaged(path, f"{name} has {found} bytes, {_MANIFEST} says {shown(size)}")
        try:
            same = _sha256(file) == digest
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read: {error}") from error
        if not same:
            raise _damaged(path, f"the SHA-256 of {name} is not the one in {_MANIFEST}")


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file. It has no digest of its own: anything unexpected is damage."""
    try:
        manifest = parse_object((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {shown(manifest['format'])}, expected {_FORMAT}: "
                "read it with the version of airl_fast that wrote it"
            )
        files = manifest["files"]
        for name in (_TENSORS, _STATE):
            if name not in files:
                raise _damaged(path, f"{_MANIFEST} omits {name}")
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in files}
        lengths = [len(manifest), len(files), *(len(entry) for entry in files.values())]
        step = manifest["step"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: no {_MANIFEST}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error)[:500]}"
        raise _damaged(path, f"{_MANIFEST}: {what}") from error
    if lengths != [3, 2, 2, 2]:
        raise _damaged(path, f"{_MANIFEST} has entries that were not written")
    if _FOLDER.fullmatch(path.name) and step != _step(path):
        raise _damaged(path, f"{_MANIFEST} is of step {shown(step)}; a copy needs another name")
    return expected


def _damaged(path: Path, what: str) -> CheckpointError:
    remedy = "take an earlier checkpoint, or a copy of this one"
    return CheckpointError(f"checkpoint {path} is damaged: {what}; {remedy}")


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON values, for ``save_checkpoint``.

    Parameters are numbered in the order in which the optimizer holds them, as in
    ``optimizer.state_dict()``.

    Returns:
        Tensors named ``{prefix}.{parameter}.{name}`` (moments, step counters) and
        ``{prefix}.group.{i}.{name}`` (a learning rate kept as a tensor); and the rest: the options
        of every parameter group, among them the learning rate, and state that is not a tensor.
    """
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, entries in saved["state"].items():
        values[str(index)] = _split(entries, f"{prefix}.{index}", tensors)
    for i, group in enumerate(saved["param_groups"]):
        groups.append(_split(group, f"{prefix}.group.{i}", tensors))
    return tensors, {"groups": groups, "values": values, "tensors": sorted(tensors)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    prefix: str,
) -> None:
    """Put back what ``flatten_optimizer`` took out, exactly.

    Args:
        optimizer: an optimizer over the same parameters in the same order and groups.
        tensors: may hold more than this optimizer's tensors.
        scalars: the second value that ``flatten_optimizer`` returned.
        prefix: the one given to ``flatten_optimizer``.

    Raises:
        ValueError: the optimizer's parameters are not those that were saved, or a tensor is
            missing.
    """
    missing = [name for name in scalars["tensors"] if name not in tensors]
    if missing:
        raise ValueError(
            f"optimizer {prefix!r}: {len(missing)} tensors are missing, first {missing[0]!r}; pass "
            "all the tensors of the checkpoint, and the prefix they were saved with"
        )
    current = optimizer.param_groups
    if [len(g["params"]) for g in current] != [len(g["params"]) for g in scalars["groups"]]:
        raise ValueError(
            f"optimizer {prefix!r}: expected parameter groups of "
            f"{[len(g['params']) for g in scalars['groups']]} parameters as saved, got "
            f"{[len(g['params']) for g in current]}; build the model and the optimizer with the "
            "options of the run that is resumed"
        )
    state = {int(index): dict(entries) for index, entries in scalars["values"].items()}
    groups = [dict(group) for group in scalars["groups"]]
    for name in scalars["tensors"]:
        owner, key = name.removeprefix(f"{prefix}.").rsplit(".", 1)
        into = groups[int(owner[6:])] if owner.startswith("group.") else state[int(owner)]
        into[key] = tensors[name].clone()  # the optimizer updates it in place
    for group, now in zip(groups, current, strict=True):
        for key, value in now.items():
            if isinstance(value, tuple) and isinstance(group.get(key), list):
                group[key] = tuple(group[key])  # AdamW's betas: JSON has no tuples
    _check_shapes(optimizer, state, prefix)
    _cut(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _split(entries: Mapping[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors of ``entries`` into ``tensors``; return the rest as JSON values."""
    rest: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{name}.{key}"] = value
        else:
            rest[key] = list(value) if isinstance(value, tuple) else value
    _check_json(rest, name)
    return rest


def _check_shapes(
    optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]], prefix: str
) -> None:
    """Refuse moments of another shape or dtype: load_state_dict would take or cast them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            if not isinstance(value, Tensor) or key == "step":
                continue
            p = parameters[index]
            same_dtype = value.dtype == p.dtype or not p.is_floating_point()
            if (value.dim() > 0 and value.shape != p.shape) or not same_dtype:
                raise ValueError(
                    f"optimizer {prefix!r}: {key} of parameter {index} was saved as {value.dtype} "
                    f"{tuple(value.shape)}, the parameter here is {p.dtype} {tuple(p.shape)}; "
                    "build the model with the options and dtype of the run that is resumed"
                )


def _cut(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Keep this rank's piece of the moments of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.dim():
                entries[key] = place_like(value, parameters[index])


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of the same values, after refusing what would not come back."""
    extents: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    result = {}
    for name, tensor in tensors.items():
        local = tensor.detach()
        if local.layout != torch.strided or local.is_meta or hasattr(local, "full_tensor"):
            raise ValueError(
                f"tensor {name!r}: expected a dense tensor with data, got {type(local).__name__} "
                f"of layout {local.layout} on {local.device}; gather a sharded one with "
                "full_tensor()"
            )
        if local.numel():
            last = sum(
                (n - 1) * stride for n, stride in zip(local.shape, local.stride(), strict=True)
            )
            start = local.data_ptr()
            end = start + (last + 1) * local.element_size()
            key = (str(local.device), local.untyped_storage().data_ptr())
            extents.setdefault(key, []).append((start, end, name))
        result[name] = local.cpu().contiguous()
    for ranges in extents.values():
        ranges.sort()
        for (_, end, first), (start, _, second) in pairwise(ranges):
            if start < end:
                raise ValueError(
                    f"tensors {first!r} and {second!r} share memory, and would no longer do so "
                    "after loading; save one of them and tie it again after loading, or save a "
                    ".clone()"
                )
    return result


def _check_json(value: Any, where: str) -> None:
    """Refuse values that JSON would refuse or change in silence (tuples, integer keys)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: expected string keys, got {key!r}; use str(key)")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(
            f"{where}: expected a JSON value (dict, list, string, number, boolean, None), got "
            f"{type(value).__name__}; save tensors among the tensors, and tuples as lists"
        )


def _checkpoints(directory: Path) -> list[Path]:
    """The checkpoint folders of a directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _FOLDER.fullmatch(p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
