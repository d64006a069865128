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
    check_json(state, "state")
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


def check_json(value: Any, where: str) -> None:
    """Refuse values that JSON would refuse or change in silence (tuples, integer keys)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: expected string keys, got {key!r}; use str(key)")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_json(item, f"{where}[{i}]")
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
