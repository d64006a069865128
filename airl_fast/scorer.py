"""A trained reward, used: score traces, rank them, find their weakest step.

f is the discriminator's energy, free of the policy; the AIRL reward is f - log pi (Fu et al.
2018, arXiv 1710.11248). Rank and locate with f: -log pi is large exactly where a token is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from airl_fast.encoding import Completion, EncodedPair, PairEncoder, Prompt
from airl_fast.loading import METADATA, LanguageModel, read_metadata
from airl_fast.models import Discriminator, Policy
from airl_fast.ops.segments import segment_last, segment_mean, segment_sum
from airl_fast.packing import Trace, pack, plan_traces
from airl_fast.passes import offsets
from airl_fast.scores import (
    By,
    Location,
    Ranked,
    Scored,
    StepScore,
    TokenScores,
    Trained,
    lowest_step,
    rank,
)
from airl_fast.spans import span_rule


class RewardScorer:
    """Scores completions with a trained reward, in eval mode and without gradients.

    Completions are packed by token budget with shared prompts stored once; the values depend
    neither on the cut nor on the order (beyond rounding). Load one with ``from_pretrained``.

    A value of several tokens: with an ``lm`` head, the sum (or mean, as trained) of its tokens'
    values; with a ``score`` head, f is read at its last token.

    Args:
        discriminator: gives f.
        trained: what it was trained for.
        policy: gives log pi; without one there is no ``reward``.
        token_budget: tokens of a forward pass.

    Raises:
        ValueError: the discriminator reads the policy's states and there is none, or the two
            have different vocabularies.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        trained: Trained,
        *,
        policy: LanguageModel | None = None,
        token_budget: int = 16384,
    ) -> None:
        body = discriminator.body or policy
        if body is None:
            raise ValueError(
                "this discriminator (trunk='policy') reads f from the policy's hidden states: "
                "pass policy= (--policy), such as DIR/policy of the run that trained it"
            )
        if policy is not None and policy.tokenizer.get_vocab() != body.tokenizer.get_vocab():
            raise ValueError(
                f"the policy {policy.origin.model!r} has another tokenizer than the reward: "
                "expected equal vocabularies; pass the policy that the reward was trained with"
            )
        self.discriminator = discriminator.eval()
        self.policy = policy if policy is None else policy.eval()
        self.trained = trained
        self.token_budget = token_budget
        self.tokenizer = body.tokenizer
        self._device = body.device
        self._context = min(model.context for model in (body, policy or body))
        vocabulary = body.head.weight.shape[0]
        self._encoder = PairEncoder(self.tokenizer, trained.boundary, vocabulary)
        self._rule = span_rule(
            trained.granularity,
            interval=trained.interval,
            boundary=trained.boundary,
            tokenizer=self.tokenizer,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        policy: Policy | str | Path | None = None,
        device: str | torch.device = "cpu",
        token_budget: int = 16384,
    ) -> RewardScorer:
        """Load a run's reward (DIR/reward, with DIR/policy where present), or a reward alone.

        Args:
            directory: a run's folder, or the reward folder in it; the latter has no policy.
            policy: a policy, or its hub name or folder, instead of the run's own.
            device: where the models go.
            token_budget: tokens of a forward pass.

        Raises:
            ValueError: no trained reward there, or one that needs a policy and has none.
        """
        directory = Path(directory)
        reward = _reward_folder(directory)
        trained = _trained(reward, read_metadata(reward, "discriminator")["training"])
        if policy is None and reward != directory and (directory / "policy").is_dir():
            policy = directory / "policy"
        if isinstance(policy, (str, Path)):
            policy = Policy.from_pretrained(policy)
        return cls(
            Discriminator.from_pretrained(reward, device=device),
            trained,
            policy=policy if policy is None else policy.to(device),
            token_budget=token_budget,
        )

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        end_of_text: bool = True,
    ) -> list[Scored]:
        """Score completions, one of each prompt.

        Args:
            prompts: each a text, a list of ``{"role", "content"}`` messages, or token ids.
            completions: each a text, a list of texts (its steps), one assistant message, or
                token ids, which are taken as they are.
            end_of_text: append the end-of-text token, as training does; False for completions
                that are not finished.

        Raises:
            ValueError: unequal numbers, an empty or unknown input, a text that the tokenizer
                cannot represent, or one longer than the model's context.
        """
        for name, value in (("prompts", prompts), ("completions", completions)):
            if isinstance(value, str):
                raise ValueError(f"expected {name} as a list, received a text: pass [{name}]")
        if len(prompts) != len(completions):
            raise ValueError(
                f"expected as many completions as prompts, received {len(completions)} for "
                f"{len(prompts)}: repeat a prompt for each of its completions"
            )
        pairs = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                pairs.append(self.encode(prompt, completion, end_of_text=end_of_text))
            except ValueError as error:
                raise ValueError(f"pair {i}: {error}") from error
        return self.score_encoded(pairs)

    def rerank(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        *,
        by: By = "f",
        end_of_text: bool = True,
    ) -> list[Ranked]:
        """Rank completions of one prompt, best first; equals stay in the order given.

        Raises:
            ValueError: as ``score``, or ``by="reward"`` without a policy.
        """
        return self.rerank_all([prompt], [completions], by=by, end_of_text=end_of_text)[0]

    def rerank_all(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        by: By = "f",
        end_of_text: bool = True,
    ) -> list[list[Ranked]]:
        """Rank the completions of several prompts, in passes that they share; as ``rerank``."""
        self.check_by(by)
        if len(prompts) != len(completions) or not all(completions):
            raise ValueError(
                f"expected a list of one completion or more for each of {len(prompts)} prompts, "
                f"received {[len(group) for group in completions]} completions"
            )
        flat = self.score(
            [p for p, group in zip(prompts, completions, strict=True) for _ in group],
            [completion for group in completions for completion in group],
            end_of_text=end_of_text,
        )
        groups = torch.tensor([0, *map(len, completions)]).cumsum(0).tolist()
        return [rank(flat[start:end], by) for start, end in pairwise(groups)]

    def check_by(self, by: str) -> None:
        """Refuse to rank by what this scorer does not know.

        Raises:
            ValueError: neither "f" nor "reward", or "reward" without a policy.
        """
        if by not in ("f", "reward"):
            raise ValueError(f"expected by='f' or 'reward', received {by!r}")
        if by == "reward" and self.policy is None:
            raise ValueError(
                "the AIRL reward f - log pi needs a policy and this reward was loaded alone: pass "
                "policy= (on the command line --policy), or rank by 'f'"
            )

    def locate(
        self, prompt: Prompt, completion: Completion, *, end_of_text: bool = True
    ) -> Location:
        """Find the step with the lowest f, the likeliest first error; see ``Location``.

        Raises:
            ValueError: as ``score``.
        """
        return lowest_step(self.score([prompt], [completion], end_of_text=end_of_text)[0])

    def encode(
        self, prompt: Prompt, completion: Completion, *, end_of_text: bool = True
    ) -> EncodedPair:
        """Encode one pair for ``score_encoded``; see ``score``.

        Raises:
            ValueError: as ``score``.
        """
        pair = self._encoder.encode(prompt, completion, end_of_text=end_of_text)
        length = len(pair.prompt) + len(pair.completion)
        if length > self._context:
            raise ValueError(
                f"{length} tokens (prompt {len(pair.prompt)}, completion {len(pair.completion)}) "
                f"do not fit the model's context of {self._context:.0f}: shorten them, or use a "
                "model with a longer context; nothing is truncated"
            )
        return pair

    @torch.no_grad()
    def score_encoded(self, pairs: Sequence[EncodedPair]) -> list[Scored]:
        """Score pairs that ``encode`` made; in their order."""
        traces = [_trace(pair, (1,) * len(pair.completion)) for pair in pairs]
        results: dict[int, Scored] = {}
        for indices in plan_traces(traces, self.token_budget) if traces else []:
            found = self._score_batch([pairs[i] for i in indices])
            results.update(zip(indices, found, strict=True))
        return [results[i] for i in range(len(pairs))]

    def _score_batch(self, pairs: Sequence[EncodedPair]) -> list[Scored]:
        sizes = [len(pair.completion) for pair in pairs]
        steps = [pair.step_lengths for pair in pairs]
        if self.trained.granularity == "step":
            spans = steps  # the given steps, where the completion came as a list of them
        else:
            spans = [self._rule(pair.completion) for pair in pairs]
        f, logp = self._read(pairs, [(1,) * size for size in sizes])
        step_f, step_reward = self._combine(pairs, steps, f, logp)
        span_f, span_reward = self._combine(pairs, spans, f, logp)

        def per_pair(values: Tensor | None, counts: Sequence[int]) -> list[Any]:
            if values is None:
                return [None] * len(pairs)
            return [tuple(part.tolist()) for part in values.split(list(counts))]

        step_counts = [len(lengths) for lengths in steps]
        cu = offsets([len(lengths) for lengths in spans], f.device)
        columns = (
            per_pair(f, sizes),
            per_pair(logp, sizes),
            per_pair(None if logp is None else f - logp, sizes),
            per_pair(step_f, step_counts),
            per_pair(step_reward, step_counts),
            segment_sum(span_f, cu).tolist(),
            per_pair(None, sizes) if span_reward is None else segment_sum(span_reward, cu).tolist(),
        )
        return [
            Scored(
                text=pair.text,
                f=total_f,
                reward=total_reward,
                granularity=self.trained.granularity,
                steps=_steps(pair, of_steps, rewards),
                tokens=TokenScores(
                    ids=pair.completion,
                    offsets=pair.offsets,
                    f=of_tokens,
                    logp=logps,
                    reward=token_rewards,
                ),
            )
            for pair, of_tokens, logps, token_rewards, of_steps, rewards, total_f, total_reward in (
                zip(pairs, *columns, strict=True)
            )
        ]

    def _read(
        self, pairs: Sequence[EncodedPair], spans: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        """One pass: f of every span [S], and log pi of every action [N]."""
        traces = [_trace(pair, lengths) for pair, lengths in zip(pairs, spans, strict=True)]
        batch = pack(traces, device=self._device)
        if self.policy is None:
            return self.discriminator.f(batch), None
        scored = self.discriminator.score(
            batch, self.policy, form="logit", temperature=self.trained.temperature
        )
        return scored.f, scored.logp

    def _combine(
        self,
        pairs: Sequence[EncodedPair],
        spans: Sequence[tuple[int, ...]],
        f: Tensor,
        logp: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Combine the dense f and log pi [N] into f and reward of spans [S]."""
        disc = self.discriminator
        cu = offsets([n for lengths in spans for n in lengths], f.device)
        over_span = segment_sum if disc.span_logp == "sum" else segment_mean
        if disc.shaping_gamma is not None:
            f = self._read(pairs, spans)[0]  # h is read at these spans' ends: a pass of its own
        elif disc.head_kind == "score":
            f = segment_last(f, cu)
        else:
            f = over_span(f, cu)
        return f, None if logp is None else f - over_span(logp, cu)


def _trace(pair: EncodedPair, lengths: tuple[int, ...]) -> Trace:
    return Trace(prompt=pair.prompt, completion=pair.completion, span_lengths=lengths)


def _steps(
    pair: EncodedPair, f: Sequence[float], reward: Sequence[float] | None
) -> tuple[StepScore, ...]:
    steps, first = [], 0
    for i, length in enumerate(pair.step_lengths):
        start, end = pair.offsets[first][0], pair.offsets[first + length - 1][1]
        steps.append(
            StepScore(
                text=pair.text[start:end],
                start=start,
                end=end,
                f=f[i],
                reward=None if reward is None else reward[i],
            )
        )
        first += length
    return tuple(steps)


def _reward_folder(directory: Path) -> Path:
    if not directory.is_dir():
        raise ValueError(
            f"{directory}: no such folder; give the run.output_dir of `airl-fast train`, or the "
            "reward folder in it"
        )
    if (directory / METADATA).is_file():
        return directory
    if (directory / "reward" / METADATA).is_file():
        return directory / "reward"
    if (directory / "policy" / METADATA).is_file():
        raise ValueError(
            f"{directory} holds a policy and no reward: a run of algorithm.name=sft or grpo learns "
            "none; give the folder of a run of airl"
        )
    if (directory / "checkpoints").is_dir():
        raise ValueError(
            f"{directory} holds a run that has not ended: its reward is written at the end; give "
            "its `airl-fast train` command again, and it goes on from its last checkpoint"
        )
    raise ValueError(
        f"{directory} holds no trained reward: expected the run.output_dir of `airl-fast train` "
        "(with reward/ and policy/ in it), or a reward folder"
    )


def _trained(folder: Path, training: dict[str, Any]) -> Trained:
    names = [field.name for field in fields(Trained)]
    missing = [name for name in names if name not in training]
    if missing:
        raise ValueError(
            f"{folder / METADATA} does not say how the reward was trained: its 'training' lacks "
            f"{', '.join(missing)}; save with Discriminator.save(..., training={{...}})"
        )
    return Trained(**{name: training[name] for name in names})
