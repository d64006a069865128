"""The rows of the scorer."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from airl_fast import RewardScorer
from airl_fast.alignment import project
from airl_fast.calibrating import LabelledSteps, calibrate
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
NO_TENSOR = "takes no tensors"
NO_OFFSETS = "has no offsets"
TEXT = "takes texts and token ids"
NO_FLOAT = "takes texts and token ids"
NAMES = "takes names and folders"

_e = Entry(
    "RewardScorer.from_pretrained",
    CELLS,
    shape=NAMES,
    offsets=NAMES,
    range=NAMES,
    non_finite=NAMES,
    dtype=NAMES,
)
_e.refuses(
    "device",
    "a device that is not there",
    lambda t: RewardScorer.from_pretrained(t.reward, device="tpu"),
    "received 'tpu'",
    "`airl-fast doctor` says what is here",
)
_e.refuses(
    "negative",
    "token_budget=0",
    lambda t: RewardScorer.from_pretrained(t.reward, token_budget=0),
    "received 0",
    "a token_budget of 1 or more",
)
_e.refuses(
    "empty",
    "an empty folder",
    lambda t: RewardScorer.from_pretrained(t.folder()),
    "holds no trained reward",
    "expected the run.output_dir of `airl-fast train`",
)
_e.refuses(
    "option",
    'passes="all"',
    lambda t: RewardScorer.from_pretrained(t.reward, passes="all"),
    "received 'all'",
    "expected passes='alone' or 'packed'",
)
_e.refuses(
    "file",
    "a folder that does not exist",
    lambda t: RewardScorer.from_pretrained(t.base / "nowhere"),
    "no such folder",
    "give the run.output_dir",
)
_e.refuses(
    "file",
    "a calibration that is none",
    lambda t: _calibrated(t, "{}"),
    "is no calibration",
    "make it again with `airl-fast calibrate`",
)
_e.refuses(
    "model",
    "the folder of a policy",
    lambda t: _only_a_policy(t),
    "holds a policy and no reward",
    "give the folder of a run of airl",
)


def _calibrated(t: Any, text: str) -> None:
    copy = t.folder() / "copy"
    shutil.copytree(t.reward / "reward", copy)
    (copy / "calibration.json").write_text(text)
    RewardScorer.from_pretrained(copy)


def _only_a_policy(t: Any) -> None:
    folder = t.folder()
    shutil.copytree(t.reward / "policy", folder / "policy")
    RewardScorer.from_pretrained(folder)


CALLS: dict[str, Any] = {
    "RewardScorer.score": lambda t, p, c, **o: t.scorer.score([p], [c], **o),
    "RewardScorer.rerank": lambda t, p, c, **o: t.scorer.rerank(p, [c], **o),
    "RewardScorer.locate": lambda t, p, c, **o: t.scorer.locate(p, c, **o),
}
for _name, _call in CALLS.items():

    def of(prompt: Any, completion: Any, call: Any = _call, **options: Any) -> Any:
        return lambda t: call(t, prompt, completion, **options)

    _e = Entry(
        _name,
        CELLS,
        shape=TEXT,
        device="takes the scorer's",
        offsets=NO_OFFSETS,
        non_finite=NO_FLOAT,
        file="reads no file",
        model="takes what the scorer holds",
    )
    _e.refuses("dtype", "a number for the prompt", of(7, "ab"), "received int", "a text, messages")
    _e.refuses("dtype", "ids of 1.5", of("1", [1.5]), "received list of float", "a text, messages")
    _e.refuses(
        "dtype",
        "a message without content",
        of([{"role": "user"}], "ab"),
        "received {'role': 'user'}",
        "{'role': text, 'content': text}",
    )
    _e.refuses(
        "range",
        "a token id past the vocabulary",
        of([3], [999]),
        "received 999",
        "encode with the model's own tokenizer",
    )
    _e.refuses(
        "range",
        "a text longer than the model's context",
        of("1", "a" * 300),
        "do not fit the model's context of 256",
        "nothing is truncated",
    )
    _e.refuses(
        "negative",
        "a token id of -1",
        of([-1], "ab"),
        "received -1",
        "encode with the model's own tokenizer",
    )
    _e.refuses("empty", "an empty prompt", of("", "ab"), "the prompt is empty", "a text, messages")
    _e.refuses(
        "empty", "an empty completion", of("1", ""), "the completion is empty", "a text, messages"
    )
    _e.refuses(
        "option",
        "an unknown keyword",
        of("1", "ab", pad=True),
        "unexpected keyword argument",
        "pad",
        TypeError,
    )

_e = Entry("RewardScorer.score", CELLS)
_e.refuses(
    "dtype",
    "a text for the prompts",
    lambda t: t.scorer.score("1", ["ab"]),
    "received a text",
    "pass [prompts]",
)
_e.refuses(
    "option",
    "2 prompts and 1 completion",
    lambda t: t.scorer.score(["1", "2"], ["ab"]),
    "received 1 for 2",
    "repeat a prompt for each of its completions",
)
_e.serves("empty", "no pairs", lambda t: t.scorer.score([], []) == [], "no results")

_e = Entry("RewardScorer.rerank", CELLS)
_e.refuses(
    "empty",
    "no completions",
    lambda t: t.scorer.rerank("1", []),
    "received [0]",
    "one completion or more",
)
_e.refuses(
    "option",
    'by="logp"',
    lambda t: t.scorer.rerank("1", ["ab"], by="logp"),
    "received 'logp'",
    "expected by='f' or 'reward'",
)
_e.refuses(
    "option",
    'method="beam"',
    lambda t: t.scorer.rerank("1", ["ab"], method="beam"),
    "received 'beam'",
    "expected method best, weighted, majority",
)
_e.refuses(
    "option",
    "1 answer for 2 completions",
    lambda t: t.scorer.rerank("1", ["ab", "c"], answers=["x"]),
    "received 1",
    "expected 2 answers, one a completion",
)
_e.refuses(
    "option",
    "votes of a task that is not known",
    lambda t: t.scorer.rerank("1", ["ab"], method="majority"),
    "'words' is none of",
    "pass answers=",
)
_e.refuses(
    "negative",
    "a temperature of 0",
    lambda t: t.scorer.rerank("1", ["ab"], method="weighted", answers=["x"], temperature=0.0),
    "received 0.0",
    "a temperature above 0",
)

_e = Entry(
    "calibrating.calibrate",
    CELLS,
    shape=NO_TENSOR,
    dtype=NO_TENSOR,
    device=NO_TENSOR,
    offsets=NO_OFFSETS,
    file="reads no file",
    model="knows no model",
)


def labelled(count: int = 10, **changed: Any) -> list[LabelledSteps]:
    made = [
        {"f": (1.0, -float(i), 2.0), "num_tokens": (1, 2, 3), "label": 1 if i % 2 else -1}
        for i in range(count)
    ]
    if made:
        made[0] |= changed
    return [LabelledSteps(**one) for one in made]


_e.refuses(
    "range",
    "a label past the steps",
    lambda _: calibrate(labelled(label=3)),
    "received 3",
    "labels count the steps from 0",
)
_e.refuses(
    "negative",
    "a label of -2",
    lambda _: calibrate(labelled(label=-2)),
    "received -2",
    "labels count the steps from 0",
)
_e.refuses(
    "non-finite",
    "f of NaN",
    lambda _: calibrate(labelled(f=(1.0, float("nan"), 2.0))),
    "received f of (1.0, nan, 2.0)",
    "leave the trace out",
)
_e.refuses("empty", "no traces", lambda _: calibrate([]), "received 0 and 0", "label more traces")
_e.refuses(
    "option", "folds=1", lambda _: calibrate(labelled(), folds=1), "received 1", "expected 2 to"
)

_e = Entry(
    "alignment.project",
    CELLS,
    shape=TEXT,
    dtype=TEXT,
    device=NO_TENSOR,
    offsets=NO_OFFSETS,
    non_finite=NO_FLOAT,
    file="reads no file",
    range="as another text",
    negative="as another text",
)


def projected(ids: Any = None, **options: Any) -> Any:
    def call(t: Any) -> Any:
        scored = t.scorer.score(["1"], ["ab"])[0]
        given = t.scorer.tokenizer("ab").input_ids if ids is None else ids
        return project(scored, given, t.scorer.tokenizer, **options)

    return call


_e.refuses("empty", "no ids", projected(ids=[]), "received none", "token ids of the completion")
_e.refuses(
    "option",
    'credit="first"',
    projected(credit="first"),
    "received 'first'",
    "expected credit 'last' or 'spread'",
)
_e.refuses(
    "option", 'by="logp"', projected(by="logp"), "received 'logp'", "expected by='f' or 'reward'"
)
_e.refuses(
    "model",
    "ids of another text",
    projected(ids=[5, 6]),
    "do not spell the completion",
    "score the text that these tokens decode to",
)


_e = Entry(
    "scorer of a reward alone",
    CELLS,
    shape=TEXT,
    dtype=TEXT,
    device="as above",
    offsets=NO_OFFSETS,
    range="as above",
    negative="as above",
    non_finite=NO_FLOAT,
    empty="as above",
    file="as above",
    option="as above",
)
_e.refuses(
    "model",
    "f - log pi without a policy",
    lambda t: t.lone.rerank("1", ["ab"], by="reward"),
    "this reward was loaded alone",
    "pass policy=",
)
assert torch is not None
