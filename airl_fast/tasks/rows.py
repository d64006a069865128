"""Rows of JSON lines, with their place in the file, and the subsets drawn from them."""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from airl_fast.parsing import parse_json, shown, shown_names
from airl_fast.tasks.base import Example
from airl_fast.tasks.drawing import Split, draw_rows, prompt_key

LONGEST_LINE = 2**28  # bytes: a small compressed file may hold one line that fills the memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of data and where it stands, for error messages."""

    values: dict[str, Any]
    where: str  # "data/train.jsonl, line 3"

    def text(self, key: str, remedy: str) -> str:
        """Return a column that has to be a non-empty text.

        Raises:
            ValueError: the key is missing, no text, or empty; with the row and the remedy.
        """
        if key not in self.values:
            found = shown_names(self.values)
            raise ValueError(f"{self.where}: no column {key!r} among {found}; {remedy}")
        value = self.values[key]
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where}: {key!r} is {shown(value)} ({type(value).__name__}), expected a "
                f"text; {remedy}"
            )
        if not value.strip():
            raise ValueError(f"{self.where}: {key!r} is empty; {remedy}")
        return value


def read_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines, compressed (.gz) or not; blank lines are no rows.

    Raises:
        ValueError: a line that is not UTF-8, not JSON, not an object or longer than
            ``LONGEST_LINE``, with its number; or a file without rows.
    """
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file as they are read; as ``read_rows``."""
    empty = True
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number in count(1):
                if not (line := file.readline(LONGEST_LINE + 1)):
                    break
                if len(line) > LONGEST_LINE:
                    raise ValueError(
                        f"{path}, line {number}: expected at most {LONGEST_LINE:,} bytes, received "
                        "more; write one JSON object a line"
                    )
                if line.strip():
                    yield parse_row(line, number, path)
                    empty = False
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    if empty:
        raise ValueError(f"{path}: no rows; expected a JSON object a line")


class RowFile:
    """The rows of a file, read anew each time they are iterated over, and never held.

    A pipe can be read only once: its rows are kept.

    Raises:
        ValueError: (while iterating) as `iter_rows`; the file has changed since the first time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = None if path.is_file() else read_rows(path)
        self._state = self._found()

    def __iter__(self) -> Iterator[Row]:
        if self._kept is not None:
            yield from self._kept
            return
        self._check()
        yield from iter_rows(self.path)
        self._check()

    def _found(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def _check(self) -> None:
        if self._found() != self._state:
            raise ValueError(f"{self.path}: it changed while it was read; start when it is whole")


def parse_row(line: bytes, number: int, path: Path) -> Row:
    """Read one line of a file.

    Raises:
        ValueError: not UTF-8, not JSON or not an object; with the line's number.
    """
    where = f"{path}, line {number}"
    try:
        values = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write one JSON object a line") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: {type(values).__name__}, expected an object; write one JSON "
            'object a line, such as {"prompt": "...", "completion": "..."}'
        )
    return Row(values=values, where=where)


def load_rows(path: str, subset: str | None = None) -> dict[str, list[Row]]:
    """Read local files by split, or the splits of a data set on the hub.

    Args:
        path: a file, a folder with train.jsonl, or a hub name such as ``openai/gsm8k``.
        subset: the data set's configuration on the hub.

    Raises:
        ValueError: nothing there, a malformed row, or a data set that cannot be loaded.
    """
    local = Path(path)
    if local.exists() or not is_hub_name(path):
        return {split: read_rows(file) for split, file in local_files(local).items()}
    return hub_rows(path, subset)


def is_hub_name(path: str) -> bool:
    """Whether a path that is not on this disk can be a data set's name on the hub."""
    named_as_file = Path(path).suffix in (".jsonl", ".json", ".gz")
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not named_as_file


def hub_rows(name: str, subset: str | None = None) -> dict[str, list[Row]]:
    """Load the splits of a data set on the hub; as ``load_rows``."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name) if subset is None else load_dataset(name, subset)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise ValueError(
            f"task.path={name!r} is not on this disk and could not be loaded from the hub "
            f"({type(error).__name__}: {error}); give a folder of JSON lines"
        ) from error
    return {
        split: [
            Row(values=dict(row), where=f"{name}, {split}, row {i}") for i, row in enumerate(data)
        ]
        for split, data in splits.items()
    }


def local_files(path: Path) -> dict[str, Path]:
    """Return the files by split: a single file is ``train``; a folder holds SPLIT.jsonl(.gz).

    Raises:
        ValueError: nothing there, or a folder without train.jsonl.
    """
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise ValueError(f"task.path={str(path)!r}: no such file or folder")
    splits = ("train", "validation", "test")
    files = {split: compressed_or_not(path / f"{split}.jsonl") for split in splits}
    if not files["train"].is_file():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"task.path={str(path)!r}: expected train.jsonl in the folder (and, if you have them, "
            f"validation.jsonl and test.jsonl), found {there}"
        )
    return {split: file for split, file in files.items() if file.is_file()}


def compressed_or_not(path: Path) -> Path:
    """Return the path, or that of the same file with ``.gz`` where only this is there."""
    packed = path.with_name(path.name + ".gz")
    return packed if packed.is_file() and not path.is_file() else path


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The four sets of a task; no prompt is in two of them."""

    train: list[Example]
    unlabelled: list[Example]
    validation: list[Example]
    test: list[Example]


def split_of(examples: list[Example]) -> Split:
    """What `draw_rows` wants to know of examples."""
    return Split(
        keys=np.fromiter((prompt_key(e.prompt) for e in examples), np.uint64, len(examples)),
        shown=np.fromiter((e.completion is not None for e in examples), bool, len(examples)),
    )


def draw_subsets(
    splits: dict[str, list[Example]],
    *,
    seed: int,
    demonstrations: int | None,
    unlabelled: int,
    validation: int,
    test: int,
) -> Subsets:
    """Draw the four sets from shuffled splits.

    ``test`` and ``validation`` come from their own split where there is one, otherwise from
    ``train``; a prompt in them is never trained on. ``unlabelled`` takes the prompts that have no
    completion first, then further ones whose completion is left out.

    Args:
        splits: examples by split; ``train`` has to be among them.
        seed: of the shuffles, one for each split.
        demonstrations: number of training traces; None takes all that remain.
        unlabelled: number of distinct training prompts without demonstration.
        validation: number of distinct prompts.
        test: number of distinct prompts.

    Raises:
        ValueError: a set larger than what is left for it (no set is shortened in silence), or
            prompts without completion that nothing would use.
    """
    drawn = draw_rows(
        {split: split_of(examples) for split, examples in splits.items()},
        seed=seed,
        demonstrations=demonstrations,
        unlabelled=unlabelled,
        validation=validation,
        test=test,
    )

    def picked(split: str, rows: np.ndarray) -> list[Example]:
        return [splits[split][row] for row in rows.tolist()]

    return Subsets(
        train=picked("train", drawn.train),
        unlabelled=[replace(e, completion=None) for e in picked("train", drawn.unlabelled)],
        validation=picked(*drawn.validation),
        test=picked(*drawn.test),
    )
