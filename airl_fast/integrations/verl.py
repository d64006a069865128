"""verl: ``compute_score``, and the reward manager ``AIRLRewardManager`` with per-token rewards.

Written against verl 0.9.1. The environment names the reward: ``AIRL_FAST_REWARD`` (the folder of a
run), ``AIRL_FAST_DEVICE`` ("cpu"), ``AIRL_FAST_VALUE`` ("f" or "reward") and, for
``compute_score``, ``AIRL_FAST_REDUCE`` ("sum", "mean", "min" or "last"). Importing this module
needs no verl; the manager is made when it is asked for::

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://airl_fast.integrations.verl
    reward.reward_manager.name=AIRLRewardManager

The manager scores the policy's own token ids and gives every span's reward to its last token in
``assemble_rm_scores``. Of verl 0.9.1 only ``RewardLoopManager.compute_rm_score`` calls that; its
agent loop, which scores while it samples, takes the sum and puts it on the last token.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import torch
from torch import Tensor

from airl_fast.integrations.rewards import Reduce, SpanRewards
from airl_fast.integrations.shared import shared_reader
from airl_fast.scores import By


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    reward: str | None = None,
    value: By | None = None,
    reduce: Reduce | None = None,
    end_of_text: bool = True,
    **kwargs: Any,
) -> dict[str, float]:
    """Score one response as text: ``reward.custom_reward_function.{path,name}``.

    verl gives neither prompt nor token ids here: the prompt comes from ``extra_info["prompt"]``
    (a text or messages), which the data must hold, and the response is encoded anew. Whether it
    was cut short is not known either. ``AIRLRewardManager`` has none of these limits.

    Args:
        data_source: not used.
        solution_str: the response, without special tokens.
        ground_truth: not used: the reward needs no reference.
        extra_info: holds ``prompt``.
        reward: the folder of a run, instead of ``AIRL_FAST_REWARD``; as the options that follow,
            from ``reward.custom_reward_function.reward_kwargs``.
        value: "f", or "reward" for f - log pi with pi the scorer's own policy.
        reduce: how the spans' rewards become one: "sum", "mean", "min" or "last".
        end_of_text: score an end-of-text token at the end.
        **kwargs: not used.

    Returns:
        ``score``, and ``airl_fast_f``, ``airl_fast_spans`` and ``airl_fast_lowest`` to log.

    Raises:
        ValueError: no reward or prompt, or a response that cannot be scored.
    """
    prompt = None if extra_info is None else extra_info.get("prompt")
    if prompt is None:
        raise ValueError(
            "expected the prompt in extra_info['prompt'], received none: add it to the data set's "
            "extra_info, or use the reward manager AIRLRewardManager, which needs none"
        )
    prompt = prompt if isinstance(prompt, str) else list(prompt)  # verl's lists are arrays
    reader, batcher = shared_reader(reward=reward, value=value, reduce=reduce)
    pair = reader.encode(prompt, solution_str, end_of_text=end_of_text)
    found = reader.read(pair, batcher.submit([pair]).result()[0])
    return {"score": reader.scalar(found), **_logged(found)}


class TokenRewards(float):
    """The sum of a response's rewards, which also knows the reward of every token.

    verl passes it on as the number that it is.
    """

    of_tokens: tuple[float, ...]

    def __new__(cls, of_tokens: tuple[float, ...]) -> TokenRewards:
        """Sum the rewards of the tokens."""
        made = super().__new__(cls, sum(of_tokens))
        made.of_tokens = of_tokens
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenRewards, (self.of_tokens,)


@cache
def reward_manager_class() -> type:
    """Make the class ``AIRLRewardManager`` over verl's ``RewardManagerBase``.

    Raises:
        ImportError: verl is not installed.
    """
    try:
        from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    except ImportError as error:
        raise ImportError(
            f"AIRLRewardManager needs verl 0.9 ({error}): install it as its documentation says"
        ) from error

    class AIRLRewardManager(RewardManagerBase):
        """Rewards from a trained scorer; see ``airl_fast.integrations.verl``."""

        def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **options: Any) -> None:
            super().__init__(config, tokenizer, compute_score)
            self.reader, self.batcher = shared_reader()
            if tokenizer.get_vocab() != self.reader.scorer.tokenizer.get_vocab():
                raise ValueError(
                    "the policy has another tokenizer than the reward: expected equal "
                    "vocabularies, since its token ids are scored; use a reward of its family, "
                    "or compute_score of this module, which encodes the text anew"
                )

        async def run_single(self, data: Any) -> dict[str, Any]:
            """Score the last sequence of a trajectory.

            Args:
                data: a ``DataProto`` of one trajectory.

            Returns:
                ``reward_score``, the sum over the spans as ``TokenRewards``, and
                ``reward_extra_info``, numbers to log.
            """
            item = data[-1:][0]
            prompt, response = _ids(item)
            turns = item.non_tensor_batch.get("__num_turns__")
            if turns is not None and int(turns) > 2:
                raise ValueError(
                    f"expected a prompt and one response, received {int(turns)} turns: tokens of "
                    "tools and users are not the policy's actions and cannot be told apart here"
                )
            pair = self.reader.encode(prompt, response)
            (scored,) = await asyncio.wrap_future(self.batcher.submit([pair]))
            found = self.reader.read(pair, scored)
            return {
                "reward_score": TokenRewards(tuple(found.of_tokens())),
                "reward_extra_info": _logged(found),
            }

        @classmethod
        def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Tensor:
            """Put the rewards where their tokens are.

            Args:
                data: a ``DataProto`` of B rows: ``responses`` [B, T], ``prompts`` [B, P] and
                    ``attention_mask`` [B, P + T].
                scores: the ``reward_score`` of ``run_single`` of every row.

            Returns:
                [B, T] float32, 0 on padding.
            """
            rewards = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
            width = data.batch["prompts"].size(1)
            mask = data.batch["attention_mask"][:, width:].bool()
            for row, valid, score in zip(rewards, mask, scores, strict=True):
                if not isinstance(score, TokenRewards) or int(valid.sum()) != len(score.of_tokens):
                    raise ValueError(
                        f"expected the TokenRewards of {int(valid.sum())} tokens that run_single "
                        f"gave, received {score!r}: rows and scores must be in one order"
                    )
                row[valid] = row.new_tensor(score.of_tokens)
            return rewards

    return AIRLRewardManager


def __getattr__(name: str) -> Any:
    if name == "AIRLRewardManager":
        return reward_manager_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _ids(item: Any) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response, without padding.

    verl's agent loop pads both on the right and gives their lengths; elsewhere the mask says
    which tokens are real.
    """
    prompt, response = item.batch["prompts"], item.batch["responses"]
    lengths = [item.non_tensor_batch.get(key) for key in ("prompt_len", "response_len")]
    if None not in lengths:
        return prompt[: int(lengths[0])].tolist(), response[: int(lengths[1])].tolist()
    mask = item.batch["attention_mask"].bool()
    width = prompt.shape[-1]
    return prompt[mask[:width]].tolist(), response[mask[width:]].tolist()


def _logged(found: SpanRewards) -> dict[str, float]:
    return {
        "airl_fast_f": found.scored.f,
        "airl_fast_spans": float(len(found.values)),
        "airl_fast_lowest": min(found.values),
    }
