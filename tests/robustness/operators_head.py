"""The rows of the operators over the head."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

import airl_fast
from tests.robustness.table import Cell, Entry
from tests.robustness.tensors import (
    META,
    NO_FILE,
    NO_MODEL,
    NO_OFFSETS,
    filled,
    first_is,
    ints,
)

CELLS: list[Cell] = []


def head(**changed: Any) -> dict[str, Any]:
    """Arguments of the head: N = 3, V = 7, D = 4; ``changed`` replaces some."""
    g = torch.Generator().manual_seed(0)
    made = {
        "hidden": torch.randn(3, 4, generator=g),
        "weight": torch.randn(7, 4, generator=g),
        "targets": ints(0, 3, 6, dtype=torch.int64),
    }
    return made | changed


def policy(**changed: Any) -> dict[str, Any]:
    return head(advantages=torch.ones(3), cu_seqs=ints(0, 2, 3)) | changed


def score(**changed: Any) -> dict[str, Any]:
    disc = {"disc_hidden": torch.ones(3, 5), "disc_weight": torch.ones(1, 5)}
    return head(**disc, cu_spans=ints(0, 2, 3)) | changed


def vocab_parallel(**given: Any) -> Any:
    """The sharded operator in a group of one process, which holds the whole head."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return airl_fast.vocab_parallel_linear_logprob(**given)
    finally:
        dist.destroy_process_group()


HEADS = {
    "linear_logprob": head,
    "vocab_parallel_linear_logprob": head,
    "linear_policy_loss": policy,
    "airl_score": score,
}
for _name, _given in HEADS.items():
    _function = vocab_parallel if "parallel" in _name else getattr(airl_fast, _name)

    def of(f=_function, given=_given, **changed):
        return lambda _: f(**given(**changed))

    _e = Entry(_name, CELLS, file=NO_FILE, model=NO_MODEL)
    _e.refuses(
        "shape",
        "hidden [1, 3, 4]",
        of(hidden=torch.ones(1, 3, 4)),
        "received (1, 3, 4)",
        "hidden.reshape(-1, hidden.shape[-1])",
    )
    _e.refuses(
        "shape",
        "hidden [3, 7], logits",
        of(hidden=torch.ones(3, 7)),
        "hidden (3, 7) does not fit weight (7, 4)",
        "pass hidden states",
    )
    _e.refuses(
        "shape",
        "targets [2] for 3 rows",
        of(targets=ints(0, 1, dtype=torch.int64)),
        "received (2,)",
        "pass one value per row",
    )
    _e.refuses(
        "shape",
        "bias [3] for V = 7",
        of(bias=torch.ones(3)),
        "received (3,)",
        "one value per row of weight",
    )
    _e.refuses(
        "shape",
        "an empty weight (sharded by ZeRO-3)",
        of(weight=torch.ones(0)),
        "weight has no elements (shape (0,))",
        "GatheredParameters",
    )
    _e.refuses(
        "dtype",
        "int32 targets",
        of(targets=ints(0, 1, 2)),
        "received torch.int32",
        ".to(torch.int64)",
    )
    _e.refuses(
        "dtype",
        "int64 hidden",
        of(hidden=torch.ones(3, 4, dtype=torch.int64)),
        "received torch.int64",
        "convert with .float()",
    )
    _e.refuses(
        "dtype",
        "a list for targets",
        of(targets=[0, 3, 6]),
        "received list",
        "pass a torch.Tensor",
        TypeError,
    )
    _e.refuses(
        "device",
        "weight on another device",
        of(weight=torch.ones(7, 4, device=META)),
        "weight is on meta",
        "move them to one device",
    )
    _e.refuses(
        "range",
        "a target of V",
        of(targets=ints(0, 7, 2, dtype=torch.int64)),
        "targets[1] = 7",
        "check that the tokenizer is the model's",
    )
    _e.refuses(
        "range",
        "a target of 2**32 + 3",
        of(targets=ints(0, 2**32 + 3, 2, dtype=torch.int64)),
        "targets[1] = 4294967299",
        "check that the tokenizer is the model's",
    )
    if _name == "airl_score":
        _e.refuses(
            "negative",
            "a target of -100",
            of(targets=ints(0, -100, 2, dtype=torch.int64)),
            "received -100 as targets[1]",
            "leave ignored rows out",
        )
    else:
        _e.refuses(
            "negative",
            "a target of -1",
            of(targets=ints(0, -1, 2, dtype=torch.int64)),
            "targets[1] = -1",
            "mask rows without a target with ignore_index",
        )
        _e.serves(
            "negative",
            "a target of -100, ignore_index",
            lambda _, f=_function, given=_given: _ignored(f, given),
            "the row counts nowhere: 0, without a gradient",
        )
    _e.refuses(
        "non-finite",
        "NaN in hidden",
        of(hidden=first_is(math.nan, 3, 4)),
        "logp[0] is nan",
        "to mask a token use a finite bias",
    )
    _e.refuses(
        "non-finite",
        "infinity in weight",
        of(weight=first_is(math.inf, 7, 4) + 1),
        "logp[0] is",
        "to mask a token use a finite bias",
    )
    _e.serves(
        "empty",
        "N = 0",
        lambda _, f=_function, given=_given: _no_rows(f, given),
        "empty results; a loss of 0",
    )
    _e.refuses(
        "option",
        "temperature=0",
        of(temperature=0.0),
        "received 0.0",
        "pass a finite number above 0",
    )
    _e.refuses(
        "option", "softcap=-1", of(softcap=-1.0), "received -1.0", "use None for no soft-capping"
    )
    _e.refuses(
        "option",
        "logit_scale=nan",
        of(logit_scale=math.nan),
        "received nan",
        "pass a finite number above 0",
    )
    _e.refuses(
        "option",
        "an unknown keyword",
        of(reduction="mean"),
        "unexpected keyword argument",
        "reduction",
        TypeError,
    )
    if _given is head:
        CELLS.append(Entry(_name, [], offsets=NO_OFFSETS).cells[0])


def _ignored(f: Any, given: Any) -> bool:
    found = f(**given(targets=ints(0, -100, 2, dtype=torch.int64)))
    logp = found if isinstance(found, torch.Tensor) else found[1].logp
    return logp[1].item() == 0.0 and logp[0].item() < 0


def _no_rows(f: Any, given: Any) -> bool:
    none = {"hidden": torch.ones(0, 4), "targets": ints(dtype=torch.int64)}
    if given is policy:
        loss, stats = f(**policy(**none, advantages=torch.ones(0), cu_seqs=ints(0)))
        return loss.item() == 0.0 and stats.logp.shape == (0,)
    if given is score:
        found = f(**score(**none, disc_hidden=torch.ones(0, 5), cu_spans=ints(0)))
        return found.reward.shape == (0,) and found.logp.shape == (0,)
    return f(**head(**none)).shape == (0,)


Entry("vocab_parallel_linear_logprob", CELLS).refuses(
    "option",
    "a call without a process group",
    lambda _: airl_fast.vocab_parallel_linear_logprob(**head()),
    "received none",
    "init_process_group first, or use linear_logprob",
)


def loss_with(**changed: Any) -> Any:
    return lambda _: airl_fast.linear_policy_loss(**policy(**changed))


_e = Entry("linear_policy_loss", CELLS)
_e.refuses(
    "shape",
    "advantages [2] for 3 rows",
    loss_with(advantages=torch.ones(2)),
    "received (2,)",
    "pass one value per row",
)
_e.refuses(
    "dtype",
    "int64 offsets",
    loss_with(cu_seqs=ints(0, 3, dtype=torch.int64)),
    "received torch.int64",
    "as torch.int32",
)
_e.refuses(
    "device",
    "offsets on another device",
    loss_with(cu_seqs=ints(0, 3).to(META)),
    "cu_seqs is on meta",
    "move them to one device",
)
_e.refuses(
    "offsets",
    "that end at 4 for 3 rows",
    loss_with(cu_seqs=ints(0, 4)),
    "received [0, 4]",
    "the running sum of the sequences' lengths",
)
_e.refuses(
    "offsets",
    "that fall",
    loss_with(cu_seqs=ints(0, 2, 1, 3)),
    "with 1 after 2",
    "the running sum of the sequences' lengths",
)
_e.serves(
    "offsets",
    "an empty sequence",
    lambda _: airl_fast.linear_policy_loss(**policy(cu_seqs=ints(0, 0, 3)))[0].isfinite(),
    "it counts as no sequence",
)
_e.refuses(
    "non-finite",
    "NaN in the advantages",
    loss_with(advantages=first_is(math.nan, 3)),
    "advantages[0] is nan",
    "look for NaN or overflow where it is made",
)
_e.refuses(
    "non-finite",
    "an old_logp of -1e4",
    loss_with(old_logp=filled((3,), -1e4), advantages=filled((3,), -1.0)),
    "the loss is inf",
    "compute old_logp and ref_logp with these targets",
)
_e.refuses(
    "option",
    "advantages that require a gradient",
    loss_with(advantages=torch.ones(3, requires_grad=True)),
    "advantages requires a gradient",
    "detach it",
)
_e.refuses(
    "option",
    'importance="step"',
    loss_with(importance="step"),
    "received 'step'",
    'expected "token" or "sequence"',
)
_e.refuses(
    "option",
    'aggregation="sum"',
    loss_with(aggregation="sum"),
    "received 'sum'",
    'expected "token", "sequence" or "constant"',
)
_e.refuses(
    "option",
    "a normaliser that nobody asked for",
    loss_with(normaliser=3.0),
    "normaliser=3.0",
    'pass a normaliser with aggregation="constant"',
)
_e.refuses(
    "option",
    "beta without ref_logp",
    loss_with(beta=0.1),
    "beta = 0.1",
    "pass the reference's log-probs, or beta=0",
)
_e.refuses(
    "option", "clip_low=-0.1", loss_with(clip_low=-0.1), "received -0.1", "pass the distance from 1"
)
