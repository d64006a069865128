"""The rows of traces, packed batches and spans."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

import airl_fast
from airl_fast.attention import packed_forward
from airl_fast.packing import PackedBatch, Source, Trace, pack
from airl_fast.planning import plan_micro_batches, plan_traces
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
NO_TENSOR = "takes no tensors"
NO_FILE = "reads no file"
NO_FLOAT = "holds integers alone"


def trace(**changed: Any) -> Trace:
    made: dict[str, Any] = {"prompt": (3, 4), "completion": (5, 6, 7), "span_lengths": (1, 2)}
    return Trace(**(made | changed))


def traced(**changed: Any) -> Any:
    return lambda _: trace(**changed)


_e = Entry(
    "Trace",
    CELLS,
    device=NO_TENSOR,
    non_finite=NO_FLOAT,
    file=NO_FILE,
    range="knows no vocabulary: the operators check ids against the model's",
    model="knows no model",
)
_e.refuses(
    "shape",
    "a nested prompt",
    traced(prompt=((3, 4),)),
    "received (3, 4)",
    "one sequence of token ids",
)
_e.refuses(
    "dtype", "a list for the prompt", traced(prompt=[3, 4]), "received list", "pass tuple(prompt)"
)
_e.refuses(
    "dtype", "ids of 1.5", traced(prompt=(1.5,)), "received 1.5", "one sequence of token ids"
)
_e.refuses(
    "offsets",
    "spans of 4 tokens over 3",
    traced(span_lengths=(2, 2)),
    "received 4",
    "make them with airl_fast.spans.span_rule",
)
_e.refuses(
    "offsets", "a span of none", traced(span_lengths=(3, 0)), "received 0", "check its maker"
)
_e.refuses(
    "negative", "a token id of -1", traced(completion=(5, -1, 7)), "received -1", "check its maker"
)
_e.refuses(
    "empty",
    "an empty completion",
    traced(completion=(), span_lengths=()),
    "received none",
    "drop the trace",
)
_e.refuses("option", "an unknown source", traced(source=7), "received 7", "one of airl_fast.Source")


def packed(**changed: Any) -> Any:
    def call(_: Any) -> PackedBatch:
        batch = pack([trace(), trace(completion=(8,), span_lengths=(1,))])
        given = {f.name: getattr(batch, f.name) for f in fields(batch)}
        for name, value in changed.items():
            given[name] = value(given[name]) if callable(value) else value
        return PackedBatch(**given)

    return call


def with_first(value: int) -> Any:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0] = value
        return x

    return change


_e = Entry("PackedBatch", CELLS, non_finite=NO_FLOAT, file=NO_FILE, model="knows no model")
_e.refuses(
    "shape",
    "input_ids [1, T]",
    packed(input_ids=lambda x: x[None]),
    "(1, 6)",
    "build batches with airl_fast.pack()",
)
_e.refuses(
    "shape",
    "a group for 1 of 2 sequences",
    packed(group=lambda x: x[:1]),
    "received 1",
    "build batches with airl_fast.pack()",
)
_e.refuses(
    "dtype",
    "int64 cu_spans",
    packed(cu_spans=lambda x: x.long()),
    "torch.int64",
    "build batches with airl_fast.pack()",
)
_e.refuses(
    "dtype",
    "a list of input_ids",
    packed(input_ids=lambda x: x.tolist()),
    "received list",
    "build batches with airl_fast.pack()",
)
_e.refuses(
    "device",
    "group on another device",
    packed(group=lambda x: x.to("meta")),
    "received meta",
    "move it",
)
_e.refuses(
    "offsets",
    "segments that do not reach the end",
    packed(cu_segments=lambda x: x - 1),
    "received [-1",
    "airl_fast.pack()",
)
_e.refuses(
    "offsets",
    "spans across two sequences",
    packed(cu_seq_spans=lambda x: torch.tensor([0, 1, 3], dtype=torch.int32)),
    "received 1 at 1",
    "airl_fast.pack()",
)
_e.refuses(
    "range",
    "an action past the tokens",
    packed(action_index=with_first(99)),
    "received 99 at 0",
    "airl_fast.pack()",
)
_e.refuses(
    "range",
    "a prefix that is no segment",
    packed(prefix=with_first(9)),
    "received 9 at 0",
    "airl_fast.pack()",
)
_e.refuses(
    "negative",
    "a token id of -1",
    packed(input_ids=with_first(-1)),
    "received -1 at 0",
    "airl_fast.pack()",
)
_e.refuses(
    "empty", "no tokens", packed(input_ids=lambda x: x[:0]), "received [0", "airl_fast.pack()"
)
_e.refuses(
    "option", "a source of 9", packed(source=with_first(9)), "received 9 at 0", "airl_fast.pack()"
)

_e = Entry(
    "pack",
    CELLS,
    shape="a Trace has checked itself",
    offsets="a Trace has checked itself",
    range="a Trace has checked itself",
    negative="a Trace has checked itself",
    non_finite=NO_FLOAT,
    file=NO_FILE,
    model="knows no model",
)
_e.refuses(
    "dtype",
    "tuples instead of traces",
    lambda _: pack([(3, 4)]),
    "received tuple",
    "make each with airl_fast.Trace",
    TypeError,
)
_e.refuses(
    "device",
    "a device that is not there",
    lambda _: pack([trace()], device="tpu"),
    "tpu",
    "device",
    RuntimeError,
)
_e.refuses("empty", "no traces", lambda _: pack([]), "received none", "skip empty batches")
_e.refuses(
    "option",
    "an unknown keyword",
    lambda _: pack([trace()], pad=True),
    "unexpected keyword argument",
    "pad",
    TypeError,
)

_e = Entry(
    "Source",
    CELLS,
    shape="takes a number",
    device=NO_TENSOR,
    offsets="takes a number",
    negative="as out of range",
    non_finite="as out of range",
    file=NO_FILE,
    model="knows no model",
    option="as out of range",
    empty="takes a number",
)
_e.refuses("range", "7", lambda _: Source(7), "7 is not a valid Source", "Source")
_e.refuses(
    "dtype", "a name", lambda _: Source("expert"), "'expert' is not a valid Source", "Source"
)

for _name, _plan in (
    ("planning.plan_micro_batches", plan_micro_batches),
    ("planning.plan_traces", lambda n, b: plan_traces([trace()] * len(n), b)),
):
    _e = Entry(
        _name,
        CELLS,
        shape="takes lengths or traces",
        device=NO_TENSOR,
        offsets="takes lengths or traces",
        non_finite=NO_FLOAT,
        file=NO_FILE,
        model="knows no model",
    )
    _e.refuses(
        "range",
        "a sequence longer than the budget",
        lambda _, f=_plan: f([5, 5], 4),
        "5 tokens at index 0",
        "raise the budget or drop the sequence",
    )
    _e.refuses(
        "negative", "a budget of -1", lambda _, f=_plan: f([5], -1), "received", "raise the budget"
    )
    _e.serves("empty", "nothing", lambda _, f=_plan: f([], 8) == [], "no micro-batches")
    if _plan is plan_micro_batches:
        _e.refuses(
            "dtype",
            "lengths of 1.5",
            lambda _: plan_micro_batches([1.5], 4),
            "received 1.5",
            "whole numbers of tokens",
        )
        _e.refuses(
            "negative",
            "a sequence of none",
            lambda _: plan_micro_batches([0], 4),
            "received 0 at index 0",
            "drop it",
        )
        _e.refuses(
            "option",
            "an unknown keyword",
            lambda _: plan_micro_batches([1], 4, ranks=2),
            "unexpected keyword argument",
            "ranks",
            TypeError,
        )
    else:
        _e.refuses(
            "dtype",
            "lengths instead of traces",
            lambda _: plan_traces([5], 9),
            "received int",
            "make each with airl_fast.Trace",
            TypeError,
        )
        _e.refuses(
            "option",
            "ranks=0",
            lambda _: plan_traces([trace()], 9, ranks=0),
            "received 0",
            "pass the number of processes",
        )

_e = Entry(
    "attention.packed_forward",
    CELLS,
    offsets="a PackedBatch has checked itself",
    negative="a PackedBatch has checked itself",
    non_finite="passes through: f and log pi refuse it",
    empty="a PackedBatch holds a token",
    file=NO_FILE,
)
_e.refuses(
    "shape",
    "inputs_embeds of 2 rows",
    lambda t: packed_forward(_trunk(t), pack([trace()]), inputs_embeds=torch.ones(2, 32)),
    "received (2, 32)",
    "one row per token of the batch",
)
_e.refuses(
    "dtype",
    "token ids instead of a batch",
    lambda t: packed_forward(_trunk(t), [3, 4]),
    "received list",
    "airl_fast.pack()",
    TypeError,
)
_e.refuses(
    "device",
    "a batch on another device",
    lambda t: packed_forward(_trunk(t), pack([trace()]).to("meta")),
    "on meta",
    "batch.to(",
)
_e.refuses(
    "range",
    "a token id past the vocabulary",
    lambda t: packed_forward(_trunk(t), pack([trace(prompt=(3, 999))])),
    "received 999",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "option",
    "an unknown keyword",
    lambda t: packed_forward(_trunk(t), pack([trace()]), padding=True),
    "unexpected keyword argument",
    "padding",
    TypeError,
)
_e.refuses(
    "model",
    "a trunk that is not enabled",
    lambda t: _not_enabled(),
    "sdpa",
    "enable_packed_attention",
)


def _trunk(t: Any) -> Any:
    return t.policy.causal_lm.base_model


def _not_enabled() -> None:
    from tests.tiny_models import tiny_model

    packed_forward(tiny_model("llama").eval().base_model, pack([trace()]))


assert airl_fast.pack is pack
