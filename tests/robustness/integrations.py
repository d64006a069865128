"""The rows of the integrations."""

from __future__ import annotations

from typing import Any

from airl_fast.integrations.rewards import RewardReader
from tests.robustness.table import Cell, Entry

CELLS: list[Cell] = []
TEXT = "takes texts and token ids"
AS_SCORE = "as RewardScorer.score"

_e = Entry(
    "integrations.RewardReader",
    CELLS,
    shape="takes a scorer",
    dtype="takes a scorer",
    device="takes a scorer",
    offsets="takes a scorer",
    range="takes a scorer",
    negative="takes a scorer",
    non_finite="takes a scorer",
    empty="takes a scorer",
    file="takes a scorer",
)
_e.refuses(
    "option",
    'value="logp"',
    lambda t: RewardReader(scorer=t.scorer, value="logp"),
    "received 'logp'",
    "expected value='f' or 'reward'",
)
_e.refuses(
    "option",
    'reduce="max"',
    lambda t: RewardReader(scorer=t.scorer, reduce="max"),
    "received 'max'",
    "expected reduce to be one of sum, mean, min, last",
)
_e.refuses(
    "model",
    '"reward" without a policy',
    lambda t: RewardReader(scorer=t.lone, value="reward"),
    "was loaded alone",
    "pass policy=",
)


def trl(prompts: Any, completions: Any, ids: Any, **options: Any) -> Any:
    def call(t: Any) -> Any:
        from airl_fast.integrations.trl import reward_function

        return reward_function(t.scorer, **options)(
            prompts=prompts, completions=completions, completion_ids=ids
        )

    return call


_e = Entry(
    "integrations.trl.reward_function",
    CELLS,
    shape=TEXT,
    device="takes the scorer's",
    offsets="has none",
    non_finite=TEXT,
    file="reads no file",
)
_e.refuses(
    "dtype",
    "a number for a prompt",
    trl([7], ["a"], [[24]]),
    "completion 0: expected the prompt as",
    "received int",
)
_e.refuses(
    "range",
    "a token id past the vocabulary",
    trl(["1"], ["a"], [[999]]),
    "received 999",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "negative",
    "a token id of -1",
    trl(["1"], ["a"], [[-1]]),
    "received -1",
    "encode with the model's own tokenizer",
)
_e.refuses(
    "empty",
    "no token ids at all",
    trl(["1"], ["a"], None),
    "received none",
    "call this function as GRPOTrainer does",
)
_e.refuses(
    "empty",
    "a completion of no tokens",
    trl(["1"], ["a"], [[]]),
    "completion 0: the completion is an empty list",
    "token ids",
)
_e.refuses(
    "option",
    'score="logits"',
    trl(["1"], ["a"], [[24]], score="logits"),
    "received 'logits'",
    "expected score='ids' or 'text'",
)
_e.refuses(
    "model",
    "ids of another tokenizer",
    trl(["1"], ["zz"], [[24]]),
    "spells the policy's token ids",
    "pass score='text'",
)

_e = Entry(
    "integrations.trl.DenseGRPOTrainer",
    CELLS,
    shape=TEXT,
    dtype=TEXT,
    device="accelerate's",
    offsets="makes them",
    range=TEXT,
    negative=TEXT,
    non_finite="token_advantages refuses them",
    file="as GRPOTrainer",
    empty="as GRPOTrainer",
)


def dense(**changed: Any) -> Any:
    def call(t: Any) -> Any:
        from trl import GRPOConfig

        from airl_fast.integrations.trl import DenseGRPOTrainer

        options = {"scale_rewards": changed.pop("scale_rewards", "group")}
        args = GRPOConfig(output_dir=str(t.folder()), report_to=[], use_cpu=True, **options)
        scorer = t.lone if changed.get("value") == "reward" else t.scorer
        return DenseGRPOTrainer(t.policy.causal_lm, scorer=scorer, args=args, **changed)

    return call


_e.refuses(
    "option",
    'scale_rewards="batch"',
    dense(scale_rewards="batch"),
    "received 'batch'",
    "set one of them in GRPOConfig",
)
_e.refuses(
    "option",
    "tools",
    dense(tools=[print]),
    "received tools",
    "use GRPOTrainer with airl_fast's reward_function",
)
_e.refuses(
    "option",
    "an unknown baseline",
    dense(baseline="median"),
    "received 'median'",
    "one of 'mean', 'leave_one_out', 'none'",
)
_e.refuses("option", "gamma=2", dense(gamma=2.0), "received 2.0", "1 stands for no discount")
_e.refuses(
    "model", '"reward" without a policy', dense(value="reward"), "was loaded alone", "pass policy="
)


def verl(text: Any, **changed: Any) -> Any:
    def call(t: Any) -> Any:
        from airl_fast.integrations.verl import compute_score

        given = {"extra_info": {"prompt": "1"}, "reward": str(t.reward)} | changed
        return compute_score("x", text, None, **given)

    return call


_e = Entry(
    "integrations.verl.compute_score",
    CELLS,
    shape=TEXT,
    device="AIRL_FAST_DEVICE",
    offsets="has none",
    range=AS_SCORE,
    negative=AS_SCORE,
    non_finite=TEXT,
)
_e.refuses("dtype", "a number for the response", verl(7), "received int", "a text, messages")
_e.refuses(
    "empty",
    "no prompt",
    verl("a", extra_info={}),
    "received none",
    "add it to the data set's extra_info",
)
_e.refuses("empty", "an empty response", verl(""), "the completion is empty", "a text, messages")
_e.refuses(
    "option",
    'reduce="max"',
    verl("a", reduce="max"),
    "received 'max'",
    "expected reduce to be one of sum, mean, min, last",
)
_e.refuses(
    "file",
    "a folder that does not exist",
    verl("a", reward="/nowhere"),
    "no such folder",
    "give the run.output_dir",
)
_e.refuses(
    "model", "no reward named", verl("a", reward=None), "no reward is named", "set AIRL_FAST_REWARD"
)


def openrlhf(queries: Any, prompts: Any, environment: str | None = "") -> Any:
    def call(t: Any) -> Any:
        import os

        from airl_fast.integrations.openrlhf import reward_func

        before = os.environ.pop("AIRL_FAST_REWARD", None)
        if environment is not None:
            os.environ["AIRL_FAST_REWARD"] = environment or str(t.reward)
        try:
            return reward_func(queries, prompts, None)
        finally:
            os.environ.pop("AIRL_FAST_REWARD", None)
            if before is not None:
                os.environ["AIRL_FAST_REWARD"] = before

    return call


_e = Entry(
    "integrations.openrlhf.reward_func",
    CELLS,
    shape=TEXT,
    device="AIRL_FAST_DEVICE",
    offsets="has none",
    range=AS_SCORE,
    negative=AS_SCORE,
    non_finite=TEXT,
)
_e.refuses("dtype", "numbers for queries", openrlhf([7], ["1"]), "7", "valid string")
_e.refuses("empty", "no queries", openrlhf([], []), "[]", "at least 1 item")
_e.refuses(
    "option",
    "a query without its prompt",
    openrlhf(["2ab"], ["1"]),
    "received '2ab'",
    "raise the limit on prompts",
)
_e.refuses(
    "option",
    "1 prompt for 2 queries",
    openrlhf(["1a", "1b"], ["1"]),
    "received 1 for 2",
    "the reward needs to know where the response begins",
)
_e.refuses(
    "file",
    "a folder that does not exist",
    openrlhf(["1a"], ["1"], "/nowhere"),
    "no such folder",
    "give the run.output_dir",
)
_e.refuses(
    "model",
    "no reward named",
    openrlhf(["1a"], ["1"], None),
    "no reward is named",
    "set AIRL_FAST_REWARD",
)
