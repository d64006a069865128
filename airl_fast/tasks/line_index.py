"""Where every row of a file of JSON lines stands: a file beside it, read in place.

Building it reads, and checks, every row once; afterwards any row is one read at its offset. A
record has the row's offset, its length, its line, the key of its prompt, and whether it has a
completion: 29 bytes. The index is made anew when the file's size or time of change is another.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, overload

import numpy as np

from airl_fast.tasks.base import Example
from airl_fast.tasks.drawing import Split, prompt_key
from airl_fast.tasks.rows import Row, parse_row

FOLDER = "AIRL_FAST_INDEX_DIR"  # where indices go instead of beside the files
RECORD = np.dtype(
    [("offset", "<i8"), ("length", "<u4"), ("line", "<i8"), ("key", "<u8"), ("shown", "?")]
)
_HEADER_BYTES = 256
_VERSION = 1  # another one where a row is read, or its key made, in another way
_BUFFERED = 65536  # records
Parse = Callable[[Row, int], Example]  # the row and its number


@dataclass(frozen=True)
class IndexedFile:
    """A file of JSON lines whose rows are read when asked for.

    Attributes:
        path: of the file; not compressed, since a compressed one cannot be read from its middle.
        parse: makes the example of a row.
        records: ``RECORD`` of each row, mapped from the index.
    """

    path: Path
    parse: Parse
    records: np.ndarray
    handle: IO[bytes]

    @property
    def split(self) -> Split:
        """Keys and flags of all rows, in memory: 9 bytes a row."""
        return Split(keys=np.array(self.records["key"]), shown=np.array(self.records["shown"]))

    def example(self, row: int) -> Example:
        """Read one row.

        Raises:
            ValueError: the file has changed under the index.
        """
        offset, length, line = (int(self.records[row][k]) for k in ("offset", "length", "line"))
        text = os.pread(self.handle.fileno(), length, offset)
        if len(text) != length:
            raise ValueError(f"{self.path}, line {line}: the file was cut while in use; start anew")
        return self.parse(parse_row(text, line, self.path), row)


class Streamed(Sequence[Example]):
    """Some rows of an indexed file, as a sequence that holds none of them.

    Args:
        file: the file.
        rows: numbers of the rows, in the sequence's order.
        bare: leave the completions out.
    """

    def __init__(self, file: IndexedFile, rows: np.ndarray, *, bare: bool = False) -> None:
        self.file, self.rows, self.bare = file, rows, bare

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...

    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        """Read a row, or some."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        example = self.file.example(int(self.rows[i]))
        return replace(example, completion=None) if self.bare else example


def open_indexed(path: Path, parse: Parse) -> IndexedFile:
    """Open a file by its index, which is built if there is none that fits.

    Raises:
        ValueError: a malformed row, with its line; no rows; or nowhere to write the index.
    """
    handle = path.open("rb")
    index = index_path(path)
    records = _read(index, _state(path))
    if records is None:
        _build(path, index, parse)
        records = _read(index, _state(path))
        if records is None:
            raise ValueError(f"{path}: it changed while it was read; start again when it is whole")
    return IndexedFile(path, parse, records, handle)


def index_path(path: Path) -> Path:
    """Where the index of a file is: beside it, or in the folder that AIRL_FAST_INDEX_DIR names."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return path.with_name(path.name + ".index")
    name = blake2b(os.fsencode(path.resolve()), digest_size=6).hexdigest()
    return Path(folder) / f"{path.name}-{name}.index"


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"version": _VERSION, "bytes": found.st_size, "changed_ns": found.st_mtime_ns}


def _read(index: Path, state: dict[str, int]) -> np.ndarray | None:
    """The records, if the index is there and of the file as it is now."""
    if not index.is_file():
        return None
    with index.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    try:
        found = json.loads(header)
    except ValueError:
        return None
    rows = found.pop("rows", 0) if isinstance(found, dict) else 0
    whole = _HEADER_BYTES + rows * RECORD.itemsize
    if not rows or found != state or index.stat().st_size != whole:
        return None
    return np.memmap(index, RECORD, "r", _HEADER_BYTES, (rows,))


def _build(path: Path, index: Path, parse: Parse) -> None:
    """Write the index whole or not at all."""
    state = _state(path)
    partial = index.with_name(f"{index.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            out.write(b" " * _HEADER_BYTES)
            rows = 0
            for buffer in _records(path, parse):
                out.write(buffer.tobytes())
                rows += len(buffer)
            if not rows:
                raise ValueError(f"{path}: no rows; expected a JSON object a line")
            out.seek(0)
            out.write(json.dumps({**state, "rows": rows}).encode().ljust(_HEADER_BYTES))
        os.replace(partial, index)
    except OSError as error:
        raise ValueError(
            f"{index}: the index of a large file cannot be written there ({error.strerror}); set "
            f"{FOLDER} to a folder with room for it"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _records(path: Path, parse: Parse) -> Iterator[np.ndarray]:
    """Records of the rows, some at a time; every row is parsed, so that a wrong one is named."""
    buffer = np.empty(_BUFFERED, RECORD)
    filled = row = offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(_followed(file, path), start=1):
            if line.strip():
                example = parse(parse_row(line, number, path), row)
                shown = example.completion is not None
                buffer[filled] = (offset, len(line), number, prompt_key(example.prompt), shown)
                filled, row = filled + 1, row + 1
                if filled == _BUFFERED:
                    yield buffer
                    filled = 0
            offset += len(line)
    yield buffer[:filled]


def _followed(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines, with progress on standard error: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, total = Console(stderr=True), path.stat().st_size
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    done = shown = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"indexing {path.name}", total=total)
        for line in file:
            yield line
            done += len(line)
            if done - shown >= 2**24:
                shown = done
                progress.update(task, completed=done)
                if not console.is_terminal and done % 2**28 < 2**24:
                    console.print(f"indexing {path.name}: {done / total:.0%}", highlight=False)
