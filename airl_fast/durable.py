"""Files and folders that are there whole or not at all, whatever happens to process or power.

What is new is written beside its place under a name with ``.tmp-``, flushed to the disk and renamed
into its place; the rename is flushed, too. One process writes to a place at a time.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_RETIRED = "-retired"


class WriteError(RuntimeError):
    """What could not be written, why, and the remedy."""


@contextmanager
def explained(what: str, kind: type[RuntimeError] = WriteError) -> Iterator[None]:
    """Turn a failed write in the block (disk full, read-only) into one error that helps.

    Raises:
        RuntimeError: of ``kind``, naming ``what`` could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise kind(
            f"cannot write {what}: {error}; check that the folder is writable and the disk has "
            "room, or choose another output directory. A run goes on from its last whole "
            "checkpoint when its command is given again"
        ) from error


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or the names in a folder, before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are missing, and flush their names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8): the old content or the new one, never a part."""
    partial = temporary(path)
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes ``final`` when the block ends without an error.

    Files of an old ``final`` that the new one does not have are taken over; where nothing would
    change, the old folder is not touched. What earlier processes left unfinished is deleted.
    """
    _bring_back(final)
    partial = temporary(final)
    remove(partial)
    make_folder(partial)
    try:
        yield partial
        if not _holds_all(final, partial):
            _take_over(final, partial)
            for path in (*partial.rglob("*"), partial):
                flush(path)
            move_into_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sweep(final)


def sweep(path: Path) -> None:
    """Delete what killed processes left of files and folders that were to be ``path``."""
    for left in path.parent.glob(f"{path.name}.tmp-*"):
        remove(left)


def temporary(path: Path) -> Path:
    """The name under which this process writes what will be ``path``."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def move_into_place(partial: Path, final: Path) -> None:
    """Rename, putting what bears the name aside; then make the rename itself durable.

    Killed between two renames, nothing bears the name, and both are whole under temporary ones.
    """
    if os.path.lexists(final):
        retire(final)
    partial.rename(final)
    flush(final.parent)


def retire(path: Path) -> None:
    """Take a name away at once, so that nothing half-deleted ever bears it."""
    path.rename(path.with_name(temporary(path).name + _RETIRED))


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link (never what it points to); nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bring_back(final: Path) -> None:
    """Undo the first of two renames, where a process was killed between them."""
    if not os.path.lexists(final):
        for path in final.parent.glob(f"{final.name}.tmp-*{_RETIRED}"):
            path.rename(final)
            return


def _holds_all(old: Path, new: Path) -> bool:
    """Whether every file of ``new`` is in ``old`` with the same bytes."""
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    return all(
        (old / name).is_file() and filecmp.cmp(old / name, new / name, shallow=False)
        for name in files
    )


def _take_over(old: Path, new: Path) -> None:
    for path in old.rglob("*") if old.is_dir() else ():
        target = new / path.relative_to(old)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
