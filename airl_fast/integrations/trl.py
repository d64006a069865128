"""TRL: a reward function for ``GRPOTrainer``, and a ``GRPOTrainer`` that takes dense rewards.

Works with TRL 1.16 (the version that the tests train with); older ones are refused on import.
Nothing of TRL is patched. ``DenseGRPOTrainer`` overrides ``_calculate_rewards``, ``_generate`` and
``_generate_and_score_completions``, and relies on ``_compute_loss`` taking advantages [B, T], as a
comment there promises to subclasses.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from copy import copy
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast

import torch
from packaging.version import Version
from torch import Tensor

from airl_fast.advantages import check_advantages, token_advantages
from airl_fast.encoding import EncodedPair
from airl_fast.integrations.rewards import Reduce, RewardReader, SpanRewards
from airl_fast.passes import offsets
from airl_fast.scorer import RewardScorer
from airl_fast.scores import By

OLDEST_TRL = "1.16"
_NAME = "airl_fast"


def _check_version() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError(
            "airl_fast.integrations.trl needs TRL, which is not installed: pip install "
            "'airl-fast[trl]'"
        ) from error
    if Version(found) < Version(OLDEST_TRL):
        raise ImportError(
            f"airl_fast.integrations.trl expects TRL {OLDEST_TRL} or newer, received {found}: pip "
            "install --upgrade 'airl-fast[trl]'"
        )


_check_version()

from accelerate.utils import gather_object  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


def reward_function(
    scorer: RewardScorer,
    *,
    value: By = "f",
    reduce: Reduce = "sum",
    score: Literal["ids", "text"] = "ids",
    tokenizer: Any = None,
    asynchronous: bool = False,
    name: str = _NAME,
) -> Any:
    """Make a reward function for ``GRPOTrainer(reward_funcs=...)``.

    What is scored, with ``score="ids"``: the ``completion_ids`` that the policy sampled, as they
    are. One that was cut short has no end-of-text token, so none is scored. The prompt is encoded
    as the scorer does: a text by its tokenizer, messages by its chat template. Policy and scorer
    must have one tokenizer: every completion's ids must spell the text that TRL decoded.

    With ``score="text"`` (a policy with another tokenizer) the text that TRL decoded is encoded
    anew by the scorer's tokenizer, with an end-of-text token where the policy's last token was one.

    Where TRL offers ``log_metric`` and ``log_extra`` it gets the means of f, of spans and of cut
    completions, and a column with the text of each completion's lowest span.

    Args:
        scorer: the trained reward.
        value: "f", or "reward" for f - log pi with pi the scorer's own policy.
        reduce: how the spans' rewards become one: "sum", "mean", "min" or "last".
        score: "ids" or "text".
        tokenizer: the policy's (``processing_class``); ``score="text"`` needs it.
        asynchronous: return an ``async def``, which scores in a thread, so that TRL runs it beside
            other async functions.
        name: of the function, and of its columns in TRL's logs.

    Returns:
        A function that takes TRL's keywords and returns one float per completion.

    Raises:
        ValueError: (here) an unknown option, "reward" without a policy, "text" without a tokenizer;
            (by the function) completions that the scorer cannot take, with the reason.
    """
    reader = RewardReader(scorer=scorer, value=value, reduce=reduce)
    if score not in ("ids", "text"):
        raise ValueError(f"expected score='ids' or 'text', received {score!r}")
    if score == "text" and tokenizer is None:
        raise ValueError(
            "score='text' needs the policy's tokenizer, to tell finished completions from cut "
            "ones: pass tokenizer="
        )
    lock = threading.Lock()  # TRL's async loop runs in a thread of its own

    def compute(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **kwargs: Any
    ) -> list[float]:
        pairs = _encoded(reader, prompts, completions, completion_ids, score, tokenizer)
        with lock:
            found = reader.rewards(pairs)
        _log(found, pairs, reader, name, kwargs)
        return [reader.scalar(one) for one in found]

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        return compute(prompts, completions, completion_ids, **kwargs)

    async def async_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        return await asyncio.to_thread(compute, prompts, completions, completion_ids, **kwargs)

    made = async_reward if asynchronous else reward
    made.__name__ = made.__qualname__ = name
    return made


class DenseGRPOTrainer(GRPOTrainer):
    """GRPO in which every token has the advantage of its own span.

    The scorer's rewards, one a span at the granularity that it was trained for, are discounted to
    go, a baseline is taken from the group, and every token gets its span's advantage
    (``airl_fast.advantages.token_advantages``). The policy's own token ids are scored, prompt and
    completion.

    Other ``reward_funcs`` are added, times ``args.reward_weights``, to the last span of their
    completion; the scorer's weight is 1. ``args.scale_rewards`` is "group" or "none". TRL logs
    the sums per completion and the advantages that GRPO would make of them.

    Args:
        model: as ``GRPOTrainer``.
        scorer: the trained reward, with the policy's tokenizer.
        reward_funcs: further rewards, one a completion.
        value: "f", or "reward" for f - log pi with pi the scorer's own policy.
        gamma: discount per span.
        baseline: "mean", "leave_one_out" or "none".
        level: where baseline and deviation are taken, "sequence" or "span".
        args: a ``GRPOConfig``.
        **options: of ``GRPOTrainer``.

    Raises:
        ValueError: another tokenizer than the scorer's, tools or environments (their tokens are
            nobody's actions), ``scale_rewards="batch"`` or ``multi_objective_aggregation`` other
            than "sum_then_normalize", or an unknown option.
    """

    def __init__(
        self,
        model: Any,
        *,
        scorer: RewardScorer,
        reward_funcs: Any = (),
        value: By = "f",
        gamma: float = 1.0,
        baseline: Literal["mean", "leave_one_out", "none"] = "mean",
        level: Literal["sequence", "span"] = "sequence",
        args: GRPOConfig,
        **options: Any,
    ) -> None:
        self.reward_reader = RewardReader(scorer=scorer, value=value)
        self._airl_dense = {"gamma": gamma, "baseline": baseline, "level": level}
        others = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        check_advantages(gamma, baseline, level)
        _check_dense(args, options)
        super().__init__(model, [self._own_rewards(), *others], args=_weighted(args), **options)
        if not _same_tokenizer(self.processing_class, scorer.tokenizer):
            raise ValueError(
                "the policy has another tokenizer than the reward: expected equal vocabularies, "
                "since every token gets a reward of its own; use a reward of the policy's family, "
                "or GRPOTrainer with reward_function(score='text')"
            )

    def _own_rewards(self) -> Any:
        def airl_fast(
            prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any
        ) -> list[float]:
            reader = self.reward_reader
            pairs = [
                reader.encode(prompt, ids)
                for prompt, ids in zip(self._airl_prompt_ids, completion_ids, strict=True)
            ]
            self._airl_found = reader.rewards(pairs)
            _log(self._airl_found, pairs, reader, _NAME, kwargs)
            return [reader.scalar(one) for one in self._airl_found]

        return airl_fast

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self._airl_prompt_ids = [list(ids) for ids in generated[0]]
        return generated

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._airl_rewards = rewards  # [B of all processes, functions], the scorer's first
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "tool_mask" in output:
            raise ValueError(
                "expected completions of the policy's tokens alone, received some of an "
                "environment (env_mask): use GRPOTrainer with airl_fast's reward_function"
            )
        output["advantages"] = self._token_advantages(output["completion_ids"])
        return output

    def _token_advantages(self, completion_ids: Tensor) -> Tensor:
        """Advantages [B, T] of this process's completions, 0 on padding."""
        weights = self.reward_weights[1:].to(self._airl_rewards)
        outcome = (self._airl_rewards[:, 1:] * weights).nansum(1).tolist()
        local = [(one.lengths, one.values) for one in self._airl_found]
        spans: list[tuple[tuple[int, ...], tuple[float, ...]]] = gather_object(local)
        rewards = [
            [*values[:-1], values[-1] + extra]
            for (_, values), extra in zip(spans, outcome, strict=True)
        ]
        training = cast(Any, self.model).training
        generations = cast(int, self.num_generations if training else self.num_generations_eval)
        device = completion_ids.device
        flat = token_advantages(
            torch.tensor([r for one in rewards for r in one], device=device),
            cu_spans=offsets([n for lengths, _ in spans for n in lengths], device),
            cu_seq_spans=offsets([len(lengths) for lengths, _ in spans], device),
            group=torch.arange(len(spans), device=device) // generations,
            scale="std" if self.scale_rewards == "group" else "none",
            **cast(Any, self._airl_dense),
        )
        sizes = [sum(lengths) for lengths, _ in spans]
        first = self.accelerator.process_index * len(local)
        mine = flat.split(sizes)[first : first + len(local)]
        padded = flat.new_zeros(completion_ids.shape)
        for row, values in zip(padded, mine, strict=True):
            row[: len(values)] = values
        return padded


def _encoded(
    reader: RewardReader,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    score: str,
    tokenizer: Any,
) -> list[EncodedPair]:
    if completion_ids is None:
        raise ValueError(
            "expected completion_ids, the token ids that the policy sampled, received none: call "
            "this function as GRPOTrainer does"
        )
    pairs = []
    for i, (prompt, completion, ids) in enumerate(
        zip(prompts, completions, completion_ids, strict=True)
    ):
        try:
            if score == "text":
                finished = ids[-1] in _ends(tokenizer)
                pairs.append(reader.encode(prompt, _text(completion), end_of_text=finished))
            else:
                pairs.append(reader.encode(prompt, list(ids)))
                _check_spelling(reader.scorer.tokenizer, ids, completion)
        except ValueError as error:
            raise ValueError(f"completion {i}: {error}") from error
    return pairs


def _check_spelling(tokenizer: Any, ids: Sequence[int], completion: Any) -> None:
    """Refuse ids of another tokenizer: with the scorer's they spell another text."""
    spelled = tokenizer.decode(list(ids), skip_special_tokens=True)
    turns = [completion] if isinstance(completion, str) else [t.get("content") for t in completion]
    for text in turns:  # of messages TRL may have parsed parts of the text away
        if isinstance(text, str) and text not in spelled:
            raise ValueError(
                f"the scorer's tokenizer spells the policy's token ids {spelled[:80]!r}, expected "
                f"{text[:80]!r}: policy and scorer have different tokenizers; pass score='text' "
                "and tokenizer= to have the text encoded anew"
            )


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    contents = [turn.get("content") for turn in completion]
    if len(contents) != 1 or not isinstance(contents[0], str):
        raise ValueError(
            f"expected one assistant message with a text, received {len(contents)} messages with "
            f"contents of {', '.join(type(c).__name__ for c in contents)}: tool calls and images "
            "cannot be scored"
        )
    return contents[0]


def _ends(tokenizer: Any) -> set[Any]:
    ends: Any = tokenizer.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def _log(
    found: Sequence[SpanRewards],
    pairs: Sequence[EncodedPair],
    reader: RewardReader,
    name: str,
    kwargs: dict[str, Any],
) -> None:
    if log_metric := kwargs.get("log_metric"):
        ends = _ends(reader.scorer.tokenizer)
        log_metric(f"{name}/f", sum(one.scored.f for one in found) / len(found))
        log_metric(f"{name}/spans", sum(len(one.values) for one in found) / len(found))
        cut = sum(pair.completion[-1] not in ends for pair in pairs)
        log_metric(f"{name}/cut", cut / len(pairs))
    if log_extra := kwargs.get("log_extra"):
        lowest = [one.scored.steps[one.values.index(min(one.values))].text for one in found]
        log_extra(f"{name}_lowest", lowest)


def _check_dense(args: GRPOConfig, options: dict[str, Any]) -> None:
    if args.scale_rewards not in ("group", "none"):
        raise ValueError(
            f"expected scale_rewards='group' or 'none' with dense rewards, received "
            f"{args.scale_rewards!r}: set one of them in GRPOConfig"
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            "expected multi_objective_aggregation='sum_then_normalize' with dense rewards, "
            f"received {args.multi_objective_aggregation!r}: leave it out of GRPOConfig"
        )
    given = [key for key in ("tools", "environment_factory") if options.get(key)]
    if given:
        raise ValueError(
            f"received {' and '.join(given)}: their tokens are not the policy's actions and cannot "
            "get dense rewards; use GRPOTrainer with airl_fast's reward_function"
        )


def _weighted(args: GRPOConfig) -> GRPOConfig:
    """The configuration with a weight of 1 for the scorer's function, which comes first."""
    if args.reward_weights is None:
        return args
    args = copy(args)
    args.reward_weights = [1.0, *cast(Any, args.reward_weights)]
    return args


def _same_tokenizer(one: Any, other: Any) -> bool:
    return hasattr(one, "get_vocab") and bool(one.get_vocab() == other.get_vocab())
