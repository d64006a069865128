"""The rows of the operators over spans, and of the choice of a backend."""

from __future__ import annotations

import math
from typing import Any

import torch

import airl_fast
from tests.robustness.operators_head import head
from tests.robustness.table import Cell, Entry
from tests.robustness.tensors import (
    META,
    NO_FILE,
    NO_MODEL,
    NO_OFFSETS,
    NO_TARGETS,
    first_is,
    ints,
)

CELLS: list[Cell] = []

_loss = airl_fast.discriminator_loss


def judged(**changed: Any) -> Any:
    given = {"f": torch.zeros(3), "logp": torch.zeros(3), "is_expert": torch.ones(3) > 0}
    return lambda _: airl_fast.discriminator_loss(**(given | changed))


_e = Entry(
    "discriminator_loss", CELLS, file=NO_FILE, model=NO_MODEL, offsets=NO_OFFSETS, range=NO_TARGETS
)
_e.refuses("shape", "logp [2]", judged(logp=torch.zeros(2)), "received (2,)", "one value per span")
_e.refuses("shape", "f [3, 1]", judged(f=torch.zeros(3, 1)), "received shape (3, 1)", "flat")
_e.refuses(
    "dtype",
    "is_expert of 0 and 1",
    judged(is_expert=torch.ones(3)),
    "received torch.float32",
    "True marks the expert's spans",
)
_e.refuses(
    "dtype",
    "int64 f",
    judged(f=torch.zeros(3, dtype=torch.int64)),
    "of torch.int64",
    "one value per token or span",
)
_e.refuses(
    "dtype", "a list for f", judged(f=[0.0]), "received list", "pass a torch.Tensor", TypeError
)
_e.refuses(
    "device",
    "logp on another device",
    judged(logp=torch.zeros(3, device=META)),
    "on meta",
    "as f is",
)
_e.refuses(
    "negative",
    "a weight of -1",
    judged(weight=torch.tensor([1.0, -1.0, 1.0])),
    "received -1.0 to 1.0",
    "leave out a batch that counts for nothing",
)
_e.refuses(
    "non-finite",
    "NaN in f",
    judged(f=first_is(math.nan, 3)),
    "received nan at index 0",
    "look for the overflow",
)
_e.serves(
    "empty",
    "S = 0",
    lambda _: _loss(torch.ones(0), torch.ones(0), torch.ones(0) > 0)[0].item() == 0.0,
    "a loss of 0, statistics of NaN",
)
_e.refuses(
    "option",
    'form="hinge"',
    judged(form="hinge"),
    "received 'hinge'",
    "one of 'airl', 'logit', 'wgan'",
)
_e.refuses("option", "label_smoothing=1", judged(label_smoothing=1.0), "received 1.0", "[0, 1)")
_e.refuses("option", "temperature=0", judged(temperature=0.0), "received 0.0", "above 0")
_e.refuses(
    "option",
    "a temperature with wgan",
    judged(form="wgan", temperature=2.0),
    "temperature=2.0",
    "leave both out",
)

for _name in (
    "segment_sum",
    "segment_mean",
    "segment_last",
    "segment_softmax",
    "discounted_returns",
):
    _f = getattr(airl_fast, _name)
    _more = (0.9,) if _name == "discounted_returns" else ()

    def at(x, cu, *more, f=_f, usual=_more):
        return lambda _: f(x, cu, *(more or usual))

    _e = Entry(_name, CELLS, file=NO_FILE, model=NO_MODEL)
    _x, _cu = torch.ones(4), ints(0, 1, 4)
    _e.refuses("shape", "values [4, 1]", at(torch.ones(4, 1), _cu), "received shape (4, 1)", "flat")
    _e.refuses(
        "shape",
        "offsets [1, 3]",
        at(_x, _cu[None]),
        "received shape (1, 3)",
        "the running sum of the lengths",
    )
    _e.refuses(
        "dtype",
        "int64 values",
        at(torch.ones(4, dtype=torch.int64), _cu),
        "of torch.int64",
        "one value per token or span",
    )
    _e.refuses("dtype", "int64 offsets", at(_x, _cu.long()), "of torch.int64", "as torch.int32")
    _e.refuses(
        "dtype",
        "a list of offsets",
        at(_x, [0, 1, 4]),
        "received list",
        "pass a torch.Tensor",
        TypeError,
    )
    _e.refuses(
        "device",
        "offsets on another device",
        at(_x, _cu.to(META)),
        "on meta",
        "move them to one device",
    )
    _e.refuses(
        "offsets",
        "that start at 1",
        at(_x, ints(1, 4)),
        "received 1 to 4",
        "check that both describe the same batch",
    )
    _e.refuses(
        "offsets",
        "an empty span",
        at(_x, ints(0, 2, 2, 4)),
        "received offsets 2 to 2",
        "leave the empty ones out",
    )
    _e.refuses(
        "offsets",
        "that fall",
        at(_x, ints(0, 3, 2, 4)),
        "received offsets 3 to 2",
        "leave the empty ones out",
    )
    _e.refuses(
        "range",
        "an offset of 2**31 - 1",
        at(_x, ints(0, 2**31 - 1)),
        "received 0 to 2147483647",
        "check that both describe the same batch",
    )
    _e.refuses(
        "negative",
        "an offset of -2",
        at(_x, ints(-2, 4)),
        "received -2 to 4",
        "check that both describe the same batch",
    )
    _e.serves(
        "empty",
        "N = 0",
        lambda _, f=_f, m=_more: f(torch.ones(0), ints(0), *m).numel() == 0,
        "an empty result",
    )
    if _name == "discounted_returns":
        _e.refuses(
            "non-finite",
            "NaN",
            at(first_is(math.nan, 4), _cu),
            "received nan at index 0",
            "look for the overflow",
        )
        _e.refuses(
            "option", "gamma=1.5", at(_x, _cu, 1.5), "received 1.5", "1 stands for no discount"
        )
    else:
        _e.serves(
            "non-finite",
            "NaN in one span",
            lambda _, f=_f: _confined(f),
            "its own span's result is NaN, no other",
        )
        _e.refuses(
            "option",
            "an unknown keyword",
            lambda _, f=_f: f(torch.ones(1), ints(0, 1), x=1),
            "argument",
            "x",
            TypeError,
        )


def _confined(f: Any) -> bool:
    found = f(torch.tensor([math.nan, 1.0, 1.0]), ints(0, 1, 3))
    return bool(found[0].isnan()) and bool(found[1:].isfinite().all())


def forced(name: str) -> None:
    with airl_fast.backend(name):
        airl_fast.segment_sum(torch.ones(1), ints(0, 1))


def _float64_head() -> None:
    with airl_fast.backend("cpu"):
        airl_fast.linear_logprob(**head(hidden=torch.ones(3, 4, dtype=torch.float64)))


_e = Entry(
    "backend",
    CELLS,
    shape="takes a name",
    offsets="takes a name",
    range="takes a name",
    negative="takes a name",
    non_finite="takes a name",
    file="takes a name",
    model=NO_MODEL,
)
_e.refuses(
    "dtype",
    "a backend that does not take float64",
    lambda _: _float64_head(),
    "float64 inputs ask for float64",
    "leave airl_fast.backend()",
    RuntimeError,
)
_e.refuses(
    "device",
    '"cuda" for tensors of the CPU',
    lambda _: forced("cuda"),
    "not on cpu",
    "leave airl_fast.backend() to let the library choose",
    RuntimeError,
)
_e.refuses(
    "empty",
    "an empty name",
    lambda _: forced(""),
    "unknown backend ''",
    "airl_fast.explain() lists",
)
_e.refuses(
    "option",
    "an unknown name",
    lambda _: forced("tpu"),
    "unknown backend 'tpu'",
    "expected one of cuda, triton, cpu, reference",
)
