"""The rows of advantages."""

from __future__ import annotations

import math
from typing import Any

import torch

import airl_fast
from airl_fast.advantages import token_advantages
from tests.robustness.table import Cell, Entry
from tests.robustness.tensors import (
    META,
    NO_FILE,
    NO_MODEL,
    NO_OFFSETS,
    first_is,
    ints,
)

CELLS: list[Cell] = []


def grouped(**changed: Any) -> Any:
    given = {"rewards": torch.ones(3), "group": ints(0, 0, 1, dtype=torch.int64)}
    return lambda _: airl_fast.group_advantages(**(given | changed))


_e = Entry(
    "group_advantages",
    CELLS,
    file=NO_FILE,
    model=NO_MODEL,
    offsets=NO_OFFSETS,
    range="any labels will do",
)
_e.refuses(
    "shape", "rewards [3, 1]", grouped(rewards=torch.ones(3, 1)), "received shape (3, 1)", "flat"
)
_e.refuses(
    "shape",
    "a group for 2 of 3",
    grouped(group=ints(0, 1, dtype=torch.int64)),
    "received shape (2,)",
    "one label for each reward",
)
_e.refuses("dtype", "int32 group", grouped(group=ints(0, 0, 1)), "of torch.int32", "int64 labels")
_e.refuses(
    "device",
    "group on another device",
    grouped(group=ints(0, 0, 1, dtype=torch.int64).to(META)),
    "on meta",
    "labels on cpu",
)
_e.serves(
    "negative",
    "labels of -5",
    lambda _: (
        airl_fast.group_advantages(torch.ones(2), ints(-5, -5, dtype=torch.int64)).tolist()
        == [0.0, 0.0]
    ),
    "labels are names: any values will do",
)
_e.refuses(
    "non-finite",
    "an infinite reward",
    grouped(rewards=first_is(math.inf, 3)),
    "received inf at index 0",
    "look for the overflow",
)
_e.serves(
    "empty",
    "B = 0",
    lambda _: airl_fast.group_advantages(torch.ones(0), ints(dtype=torch.int64)).numel() == 0,
    "an empty result",
)
_e.refuses(
    "option",
    'baseline="median"',
    grouped(baseline="median"),
    "received 'median'",
    "one of 'mean', 'leave_one_out', 'none'",
)
_e.refuses(
    "option",
    "leave_one_out with a group of one",
    grouped(baseline="leave_one_out"),
    "group 1 has one member",
    "use baseline='mean'",
)


def advantages(**changed: Any) -> Any:
    given = {
        "rewards": torch.ones(3),
        "cu_spans": ints(0, 2, 3, 5),
        "cu_seq_spans": ints(0, 2, 3),
        "group": ints(0, 0, dtype=torch.int64),
    }
    return lambda _: token_advantages(**(given | changed))


_e = Entry("advantages.token_advantages", CELLS, file=NO_FILE, model=NO_MODEL)
_e.refuses(
    "shape",
    "cu_spans for 2 of 3 rewards",
    advantages(cu_spans=ints(0, 2, 5)),
    "received 3",
    "one span for each reward",
)
_e.refuses(
    "dtype",
    "int64 cu_spans",
    advantages(cu_spans=ints(0, 2, 3, 5, dtype=torch.int64)),
    "of torch.int64",
    "as torch.int32",
)
_e.refuses(
    "device",
    "cu_spans on another device",
    advantages(cu_spans=ints(0, 2, 3, 5).to(META)),
    "on meta",
    "move them to one device",
)
_e.refuses(
    "offsets",
    "an empty span",
    advantages(cu_spans=ints(0, 2, 2, 5)),
    "received offsets 2 to 2",
    "leave the empty ones out",
)
_e.refuses(
    "range",
    "sequences past the spans",
    advantages(cu_seq_spans=ints(0, 2, 4)),
    "received 0 to 4",
    "check that both describe the same batch",
)
_e.refuses(
    "negative",
    "cu_spans from -1",
    advantages(cu_spans=ints(-1, 2, 3, 5)),
    "received -1 to 5",
    "check that both describe the same batch",
)
_e.refuses(
    "non-finite",
    "a NaN reward",
    advantages(rewards=first_is(math.nan, 3)),
    "received nan at index 0",
    "look for the overflow",
)
_e.serves(
    "empty",
    "no sequence",
    lambda _: (
        token_advantages(
            torch.ones(0), cu_spans=ints(0), cu_seq_spans=ints(0), group=ints(dtype=torch.int64)
        ).numel()
        == 0
    ),
    "an empty result",
)
_e.refuses(
    "option",
    'level="token"',
    advantages(level="token"),
    "received 'token'",
    "one of 'sequence', 'span'",
)
_e.refuses(
    "option", "gamma=-0.1", advantages(gamma=-0.1), "received -0.1", "1 stands for no discount"
)
