"""Which rows go into which set of a task, decided by arrays: no row is read for it.

A row is known by the key of its prompt (64 bits) and by whether it has a completion.
"""

import json
import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from airl_fast.tasks.base import Prompt

Rows = np.ndarray  # int64 row numbers


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one file."""

    keys: np.ndarray  # uint64, `prompt_key` of each
    shown: np.ndarray  # bool, whether it has a completion


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Row numbers of the four sets; those of validation and test with the split they are from."""

    train: Rows
    unlabelled: Rows
    validation: tuple[str, Rows]
    test: tuple[str, Rows]


def prompt_key(prompt: Prompt) -> int:
    """A hash of 64 bits: two of ten million prompts share one with a probability of 3e-6."""
    text = prompt if isinstance(prompt, str) else json.dumps([[m.role, m.content] for m in prompt])
    kind = b"text" if isinstance(prompt, str) else b"messages"
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little")


def shuffled_order(count: int, seed: int | str) -> array:
    """The order into which ``random.Random(seed).shuffle`` puts ``count`` items, as int64.

    In an array: a list of ten million numbers takes five times as much.
    """
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    return order


def draw_rows(
    splits: dict[str, Split],
    *,
    seed: int,
    demonstrations: int | None,
    unlabelled: int,
    validation: int,
    test: int,
) -> Drawn:
    """Draw the four sets from shuffled splits; arguments and errors of ``rows.draw_subsets``."""
    pools = {
        name: np.frombuffer(shuffled_order(len(split.keys), f"{name}/{seed}"), np.int64)
        for name, split in splits.items()
    }
    used = np.zeros(0, np.uint64)

    def fresh(name: str, pool: Rows) -> Rows:
        return pool[~np.isin(splits[name].keys[pool], used)]

    def take(name: str, pool: Rows, count: int, key: str) -> Rows:
        nonlocal used
        taken = _distinct(fresh(name, pool), splits[name].keys, count, key) if count else pool[:0]
        used = np.union1d(used, splits[name].keys[taken])
        return taken

    home = {key: key if key in splits else "train" for key in ("test", "validation")}
    tests = take(home["test"], pools[home["test"]], test, "task.test")
    validations = take(home["validation"], pools[home["validation"]], validation, "task.validation")

    keys, shown = splits["train"].keys, splits["train"].shown
    left = fresh("train", pools["train"])
    labelled, bare = left[shown[left]], left[~shown[left]]
    bare = bare[~np.isin(keys[bare], keys[labelled])]
    if len(bare) and not unlabelled:
        raise ValueError(
            f"{len(bare)} training prompts have no completion and task.unlabelled=0; set "
            f"task.unlabelled={len(bare)} to train the policy on them too, or remove them"
        )
    if demonstrations is None:
        pool = np.concatenate([bare, labelled[::-1]])
        extra = take("train", pool, unlabelled, "task.unlabelled")
        train = fresh("train", labelled) if unlabelled else labelled
    else:
        if demonstrations > len(labelled):
            raise ValueError(
                f"task.demonstrations={demonstrations}, and the data has {len(labelled)} left "
                f"for it; set task.demonstrations to {len(labelled)} or less, or null for all"
            )
        train = labelled[:demonstrations]
        used = np.union1d(used, keys[train])
        pool = np.concatenate([bare, labelled[demonstrations:]])
        extra = take("train", pool, unlabelled, "task.unlabelled")
    if not len(train):
        raise ValueError("no demonstrations are left to train on; ask for smaller other sets")
    return Drawn(
        train=train,
        unlabelled=extra,
        validation=(home["validation"], validations),
        test=(home["test"], tests),
    )


def _distinct(pool: Rows, keys: np.ndarray, count: int, key: str) -> Rows:
    """``count`` rows of the pool, the last of each distinct prompt, by its first appearance."""
    found, first = np.unique(keys[pool], return_index=True)
    if count > len(found):
        raise ValueError(
            f"{key}={count}, and the data has {len(found)} prompts left for it; set {key} to "
            f"{len(found)} or less"
        )
    wanted = keys[pool[np.sort(first)[:count]]]
    members = pool[np.isin(keys[pool], wanted)]
    rows: Iterable[int] = {int(keys[row]): int(row) for row in members}.values()
    return np.fromiter(rows, np.int64, count)
