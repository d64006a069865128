"""Rows of JSON lines, with their place in the file, and the subsets drawn from them."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from airl_fast.tasks.base import Example


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
            found = ", ".join(map(repr, self.values)) or "nothing"
            raise ValueError(f"{self.where}: no column {key!r} among {found}; {remedy}")
        value = self.values[key]
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where}: {key!r} is {value!r} ({type(value).__name__}), expected a text; "
                f"{remedy}"
            )
        if not value.strip():
            raise ValueError(f"{self.where}: {key!r} is empty; {remedy}")
        return value


def read_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines; blank lines are no rows.

    Raises:
        ValueError: a line that is not UTF-8, not JSON or not an object, with its number; or a
            file without rows.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); write one JSON "
                    "object a line"
                ) from None
            if not isinstance(values, dict):
                raise ValueError(
                    f"{where}: {type(values).__name__}, expected an object; write one JSON "
                    'object a line, such as {"prompt": "...", "completion": "..."}'
                )
            rows.append(Row(values=values, where=where))
    if not rows:
        raise ValueError(f"{path}: no rows; expected a JSON object a line")
    return rows


def local_files(path: Path) -> dict[str, Path]:
    """Return the files by split: a single file is ``train``; a folder holds SPLIT.jsonl.

    Raises:
        ValueError: nothing there, or a folder without train.jsonl.
    """
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise ValueError(f"task.path={str(path)!r}: no such file or folder")
    splits = ("train", "validation", "test")
    files = {split: path / f"{split}.jsonl" for split in splits}
    if not files["train"].is_file():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"task.path={str(path)!r}: expected train.jsonl in the folder (and, if you have them, "
            f"validation.jsonl and test.jsonl), found {there}"
        )
    return {split: file for split, file in files.items() if file.is_file()}


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The four sets of a task; no prompt is in two of them."""

    train: list[Example]
    unlabelled: list[Example]
    validation: list[Example]
    test: list[Example]


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
    pools = {}
    for split, examples in splits.items():
        pools[split] = list(examples)
        random.Random(f"{split}/{seed}").shuffle(pools[split])
    used: set[Any] = set()

    def take(pool: Iterable[Example], count: int, key: str) -> list[Example]:
        fresh = {e.prompt: e for e in pool if e.prompt not in used}
        if count > len(fresh):
            raise ValueError(
                f"{key}={count}, and the data has {len(fresh)} prompts left for it; set {key} to "
                f"{len(fresh)} or less"
            )
        taken = list(fresh.values())[:count]
        used.update(example.prompt for example in taken)
        return taken

    tests = take(pools.get("test", pools["train"]), test, "task.test")
    validations = take(pools.get("validation", pools["train"]), validation, "task.validation")

    left = [example for example in pools["train"] if example.prompt not in used]
    labelled = [example for example in left if example.completion is not None]
    shown = {example.prompt for example in labelled}
    bare = [e for e in left if e.completion is None and e.prompt not in shown]
    if bare and not unlabelled:
        raise ValueError(
            f"{len(bare)} training prompts have no completion and task.unlabelled=0; set "
            f"task.unlabelled={len(bare)} to train the policy on them too, or remove them"
        )
    if demonstrations is None:
        extra = take([*bare, *reversed(labelled)], unlabelled, "task.unlabelled")
        train = [example for example in labelled if example.prompt not in used]
    else:
        if demonstrations > len(labelled):
            raise ValueError(
                f"task.demonstrations={demonstrations}, and the data has {len(labelled)} left "
                f"for it; set task.demonstrations to {len(labelled)} or less, or null for all"
            )
        train = labelled[:demonstrations]
        used.update(example.prompt for example in train)
        extra = take([*bare, *labelled[demonstrations:]], unlabelled, "task.unlabelled")
    if not train:
        raise ValueError("no demonstrations are left to train on; ask for smaller other sets")
    return Subsets(
        train=train,
        unlabelled=[replace(example, completion=None) for example in extra],
        validation=validations,
        test=tests,
    )
