"""The rows of spans."""

from __future__ import annotations

from typing import Any

from airl_fast.spans import span_offsets, span_rule
from tests.robustness.table import Cell, Entry
from tests.tiny_models import tiny_tokenizer

CELLS: list[Cell] = []
NO_TENSOR = "takes no tensors"
NO_FILE = "reads no file"
NO_FLOAT = "holds integers alone"


def cut(granularity: str, ids: Any = (3, 4), **options: Any) -> Any:
    return lambda _: span_rule(granularity, **options)(ids)


_e = Entry(
    "spans.span_rule",
    CELLS,
    shape="takes token ids",
    device=NO_TENSOR,
    offsets="makes them",
    range="knows no vocabulary",
    non_finite=NO_FLOAT,
    file=NO_FILE,
)
_e.refuses(
    "dtype",
    "an interval of 1.5",
    cut("interval", interval=1.5),
    "received 1.5",
    "a whole number of tokens",
)
_e.refuses("negative", "an interval of 0", cut("interval", interval=0), "received 0", "raise it")
_e.refuses("empty", "an empty completion", cut("dense", ids=()), "received none", "drop it")
_e.refuses("empty", "no boundary_ids", cut("step", boundary_ids=[]), "received none", "name one")
_e.refuses(
    "option",
    'granularity="token"',
    cut("token"),
    "received 'token'",
    "expected granularity dense, interval, step, sparse",
)
_e.refuses(
    "option",
    "a boundary that matches nothing at all",
    cut("step", boundary="", tokenizer=tiny_tokenizer()),
    "received ''",
    "match some text",
)
_e.refuses(
    "option",
    "a boundary that is no expression",
    cut("step", boundary="(", tokenizer=tiny_tokenizer()),
    "received '('",
    "escape literal text with re.escape",
)
_e.refuses("model", "steps without a tokenizer", cut("step"), "received none", "pass tokenizer")

_e = Entry(
    "spans.span_offsets",
    CELLS,
    shape="takes token ids",
    device=NO_TENSOR,
    range="knows no vocabulary",
    non_finite=NO_FLOAT,
    file=NO_FILE,
    dtype="takes token ids",
    option="has none",
)
_e.refuses(
    "offsets",
    "spans of 4 tokens over 3",
    lambda _: span_offsets([4, 5, 6], (2, 2), tiny_tokenizer()),
    "received (2, 2)",
    "make them with span_rule",
)
_e.refuses(
    "negative",
    "a span of 0",
    lambda _: span_offsets([4], (1, 0), tiny_tokenizer()),
    "received (1, 0)",
    "make them with span_rule",
)
_e.refuses(
    "empty",
    "no tokens",
    lambda _: span_offsets([], (), tiny_tokenizer()),
    "received ()",
    "make them with span_rule",
)
_e.refuses(
    "model",
    "a decoder that looks ahead",
    lambda _: _ahead(),
    "does not decode a token",
    "boundary_ids",
)


def _ahead() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token=None))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "z")])
    span_offsets([0, 1], (1, 1), PreTrainedTokenizerFast(tokenizer_object=tokenizer))
