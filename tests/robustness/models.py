"""The rows of models and sampling."""

from __future__ import annotations

import shutil
from typing import Any

from airl_fast import Discriminator, Policy
from airl_fast.rollout import sample
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
NO_TENSOR = "takes no tensors"
NO_OFFSETS = "has no offsets"
TEXT = "takes texts and token ids"
NO_FLOAT = "takes texts and token ids"
NAMES = "takes names and folders"


def damaged(t: Any, part: str, file: str) -> Any:
    """A copy of the reward with one file cut short."""
    copy = t.folder() / "copy"
    shutil.copytree(t.reward / part, copy)
    path = copy / file
    path.write_bytes(path.read_bytes()[: max(1, path.stat().st_size // 2)])
    return copy


_e = Entry(
    "Policy.from_pretrained", CELLS, shape=NAMES, offsets=NAMES, range=NAMES, non_finite=NAMES
)
_e.refuses(
    "dtype",
    'dtype="float32"',
    lambda t: Policy.from_pretrained(t.reward / "q", dtype="float33"),
    "received 'float33'",
    "a torch dtype such as torch.float32",
)
_e.refuses(
    "device",
    "a device that is not there",
    lambda t: Policy.from_pretrained(t.reward / "policy", device="tpu"),
    "received 'tpu'",
    "`airl-fast doctor` says what is here",
)
_e.refuses(
    "negative",
    "lora_rank=-1",
    lambda t: Policy.from_pretrained(t.reward / "q", lora_rank=-1),
    "received lora_rank=-1",
    "0 trains all weights",
)
_e.refuses(
    "empty",
    "an empty folder",
    lambda t: Policy.from_pretrained(t.folder()),
    "holds no config.json",
    "give a hub name, or the folder of a saved model",
)
_e.refuses(
    "option",
    "another rank than the saved adapter's",
    lambda t: _other_rank(t),
    "received lora_rank=3",
    "give lora_rank=2 (or 0)",
)
_e.refuses(
    "file",
    "a folder that does not exist",
    lambda t: Policy.from_pretrained(t.base / "nowhere"),
    "nowhere",
    "give a hub name, or the folder of a saved model",
)
_e.refuses(
    "file",
    "weights cut short",
    lambda t: Policy.from_pretrained(damaged(t, "policy", "model.safetensors")),
    "model.safetensors",
    "copy or train it again",
)
_e.refuses(
    "file",
    "metadata that is no JSON",
    lambda t: Policy.from_pretrained(damaged(t, "policy", "airl_fast.json")),
    "airl_fast.json",
    "restore it from a copy",
)
_e.refuses(
    "model",
    "the folder of a reward",
    lambda t: Policy.from_pretrained(t.reward / "reward"),
    "holds a 'discriminator'",
    "expected a 'policy'",
)


def _other_rank(t: Any) -> None:
    saved = t.folder()
    Policy.from_pretrained(t.reward / "q", lora_rank=2).save(saved)
    Policy.from_pretrained(saved, lora_rank=3)


_e = Entry(
    "Discriminator.create",
    CELLS,
    shape=NAMES,
    offsets=NAMES,
    range=NAMES,
    non_finite=NAMES,
    dtype=NAMES,
    device="takes the policy's",
    empty=NAMES,
    file="as Policy.from_pretrained",
)
_e.refuses(
    "negative",
    "trunk='shared' with rank 0",
    lambda t: Discriminator.create(t.policy, trunk="shared"),
    "received lora_rank=0",
    "give it a rank of 1 or more",
)
_e.refuses(
    "option",
    'head="value"',
    lambda t: Discriminator.create(t.policy, head="value"),
    "received 'value'",
    "expected head 'lm' or 'score'",
)
_e.refuses(
    "option",
    'trunk="none"',
    lambda t: Discriminator.create(t.policy, trunk="none"),
    "received 'none'",
    "expected trunk 'own', 'shared' or 'policy'",
)
_e.refuses(
    "option",
    'span_logp="max"',
    lambda t: Discriminator.create(t.policy, trunk="policy", head="score", span_logp="max"),
    "received 'max'",
    "expected span_logp 'sum' or 'mean'",
)
_e.refuses(
    "option",
    "shaping_gamma with an lm head",
    lambda t: Discriminator.create(t.policy, shaping_gamma=0.9),
    "received head='lm'",
    "shaping needs the second row of a 'score' head",
)
_e.refuses(
    "option",
    "shaping_gamma=2",
    lambda t: Discriminator.create(t.policy, trunk="policy", head="score", shaping_gamma=2.0),
    "received 2.0",
    "a discount in [0, 1]",
)
_e.refuses(
    "model",
    "a model of another tokenizer",
    lambda t: Discriminator.create(t.policy, model="arithmetic-base"),
    "has another tokenizer",
    "use a model of the same family",
)

_e = Entry(
    "Discriminator.from_pretrained",
    CELLS,
    shape=NAMES,
    offsets=NAMES,
    range=NAMES,
    negative=NAMES,
    non_finite=NAMES,
    dtype=NAMES,
    option="has none but the device",
)
_e.refuses(
    "device",
    "a device that is not there",
    lambda t: Discriminator.from_pretrained(t.reward / "reward", device="tpu"),
    "received 'tpu'",
    "`airl-fast doctor` says what is here",
)
_e.refuses(
    "empty",
    "an empty folder",
    lambda t: Discriminator.from_pretrained(t.folder()),
    "holds no airl_fast.json",
    "give the folder that training wrote",
)
_e.refuses(
    "file",
    "a head cut short",
    lambda t: Discriminator.from_pretrained(damaged(t, "reward", "discriminator_head.safetensors")),
    "discriminator_head.safetensors",
    "copy or train it again",
)
_e.refuses(
    "model",
    "the folder of a policy",
    lambda t: Discriminator.from_pretrained(t.reward / "policy"),
    "holds a 'policy'",
    "expected a 'discriminator'",
)


def sampled(prompts: Any = ((3, 4),), **changed: Any) -> Any:
    given = {"group_size": 1, "max_new_tokens": 2, "seed": 0} | changed
    return lambda t: sample(t.policy, prompts, **given)


_e = Entry(
    "rollout.sample",
    CELLS,
    shape="takes token ids",
    device="takes the policy's",
    offsets=NO_OFFSETS,
    file="reads no file",
    model="takes any Policy",
)
_e.refuses(
    "dtype",
    "a text for a prompt",
    sampled(["ab"]),
    "received 'a'",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "range",
    "a token id past the vocabulary",
    sampled([[3, 999]]),
    "received 999",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "negative",
    "a token id of -1",
    sampled([[-1]]),
    "received -1",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "negative",
    "max_new_tokens=0",
    sampled(max_new_tokens=0),
    "received 0",
    "max_new_tokens of 1 or more",
)
_e.refuses(
    "negative", "group_size=0", sampled(group_size=0), "received 0", "group_size of 1 or more"
)
_e.refuses(
    "range",
    "a completion past the policy's context",
    sampled(max_new_tokens=10**6),
    "prompt 0 has 2 tokens: with max_new_tokens=1000000",
    "lower max_new_tokens",
)
_e.refuses(
    "negative",
    "a temperature of -1",
    sampled(temperature=-1.0),
    "received -1.0",
    "temperature must be at least 0",
)
_e.refuses(
    "non-finite",
    "a temperature of NaN",
    sampled(temperature=float("nan")),
    "received nan",
    "temperature must be at least 0",
)
_e.refuses("empty", "an empty prompt", sampled([[]]), "prompt 0 is empty", "at least one token")
_e.serves("empty", "no prompts", lambda t: sampled([])(t) == [], "no completions")
_e.refuses("option", "an empty stop string", sampled(stop=[""]), "received ''", "leave it out")
