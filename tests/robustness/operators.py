"""The rows of the operators."""

from __future__ import annotations

import math
from typing import Any

import torch

import airl_fast
from airl_fast.advantages import token_advantages
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
NO_FILE = "takes tensors, no file"
NO_MODEL = "takes tensors, no model"
NO_OFFSETS = "has no offsets"
NO_TARGETS = "has neither targets nor indices"
META = torch.device("meta")


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


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


def filled(shape: tuple[int, ...], value: float) -> torch.Tensor:
    return torch.full(shape, value)


def first_is(value: float, *shape: int) -> torch.Tensor:
    x = torch.zeros(shape)
    x.view(-1)[0] = value
    return x


HEADS = {"linear_logprob": head, "linear_policy_loss": policy, "airl_score": score}
for _name, _given in HEADS.items():
    _function = getattr(airl_fast, _name)

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
    if _name == "linear_logprob":
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


_f = airl_fast.linear_policy_loss


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
    "of torch.int64",
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
    "received 0 to 4",
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
        _e.refuses("option", "gamma=1.5", at(_x, _cu, 1.5), "received 1.5", "a discount in [0, 1]")
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
_e.refuses("option", "gamma=-0.1", advantages(gamma=-0.1), "received -0.1", "a discount in [0, 1]")


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
