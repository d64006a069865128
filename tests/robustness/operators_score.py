"""The rows of airl_score that the other operators over the head do not have."""

from __future__ import annotations

import math
from typing import Any

import torch

import airl_fast
from tests.robustness.operators_head import score
from tests.robustness.table import Cell, Entry
from tests.robustness.tensors import filled, ints

CELLS: list[Cell] = []


def scored_with(**changed: Any) -> Any:
    return lambda _: airl_fast.airl_score(**score(**changed))


_two = {"disc_weight": torch.ones(2, 5), "shaping_gamma": 0.9}
_e = Entry("airl_score", CELLS)
_e.refuses(
    "shape",
    "disc_weight of 3 rows",
    scored_with(disc_weight=torch.ones(3, 5)),
    "received shape (3, 5)",
    "one row is f, two are g and h",
)
_e.refuses(
    "shape",
    "disc_hidden [2, 5]",
    scored_with(disc_hidden=torch.ones(2, 5)),
    "received (2, 5)",
    "one row per action and as wide as disc_weight",
)
_e.refuses(
    "offsets",
    "an empty span",
    scored_with(cu_spans=ints(0, 2, 2, 3)),
    "received offsets 2 to 2",
    "leave the empty ones out",
)
_e.refuses(
    "offsets",
    "that end at 9",
    scored_with(cu_spans=ints(0, 9)),
    "received 0 to 9",
    "check that both describe the same batch",
)
_e.refuses(
    "offsets",
    "sequences that do not cut the spans",
    scored_with(**_two, cu_seq_spans=ints(0, 5)),
    "received 0 to 5",
    "check that both describe the same batch",
)
_e.refuses(
    "non-finite",
    "infinity in disc_hidden",
    scored_with(disc_hidden=filled((3, 5), math.inf)),
    "received inf",
    "look for the overflow",
)
_e.refuses(
    "option",
    'disc_head="value"',
    scored_with(disc_head="value"),
    "received 'value'",
    "one of 'score', 'lm'",
)
_e.refuses(
    "option",
    "two rows without shaping_gamma",
    scored_with(disc_weight=torch.ones(2, 5)),
    "received None",
    "shaping_gamma goes with a score head of two rows",
)
_e.refuses(
    "option",
    "shaping without cu_seq_spans",
    scored_with(**_two),
    "received None",
    "the offsets [B + 1] of the sequences",
)
_e.refuses(
    "option",
    "disc_scale with a score head",
    scored_with(disc_scale=2.0),
    "received 2.0",
    "leave it out",
)
