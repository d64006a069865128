"""The models of a scorer, run over encoded pairs: f and log pi of every action.

    P pairs   N actions of them   S spans of them

Alone: every prompt and every completion is a pass of its own, whose shapes are its own lengths and
its prompt's; so its bits are the same whatever else is scored with it. A prompt is run once for
the completions that are scored together. Packed: one pass takes as many as fit the token budget;
matrix products of other shapes round otherwise, so that the values agree up to rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from airl_fast.attention import Continuation
from airl_fast.encoding import EncodedPair
from airl_fast.loading import LanguageModel
from airl_fast.models import Discriminator
from airl_fast.ops.segments import segment_last, segment_mean, segment_sum
from airl_fast.packing import PackedBatch, Trace, pack, plan_traces
from airl_fast.passes import offsets

Passes = Literal["alone", "packed"]
Cut = Sequence[tuple[int, ...]]  # span lengths of every pair


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one batch of pairs says.

    Attributes:
        f: [N] float32, each action a span of its own.
        logp: [N'] float32 of the policy's actions (N' = N unless its tokenizer is another), or
            None without a policy.
        spans: gives f [S] of spans of the reward's actions, and f - log pi [S] where log pi is of as
            many spans of the policy's, or None.
    """

    f: Tensor
    logp: Tensor | None
    spans: Callable[[Cut, Cut], tuple[Tensor, Tensor | None]]


class Reader:
    """Runs a discriminator and, where there is one, a policy.

    Args:
        discriminator: gives f.
        policy: gives log pi.
        temperature: of log pi.
        passes: "alone" or "packed".
        token_budget: tokens of a packed pass; "alone" ignores it.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        policy: LanguageModel | None,
        *,
        temperature: float,
        passes: Passes,
        token_budget: int,
    ) -> None:
        self.discriminator = discriminator
        self.policy = policy
        self.temperature = temperature
        self.passes = passes
        self.token_budget = token_budget

    @torch.no_grad()
    def read(self, pairs: Sequence[EncodedPair]) -> Iterator[tuple[list[int], Reading]]:
        """Yield readings of batches of the pairs, with the indices of the pairs in each.

        Raises:
            ValueError: a pair longer than the token budget (packed passes only).
        """
        if self.passes == "packed":
            traces = [_trace(pair, _dense(pair)) for pair in pairs]
            for indices in plan_traces(traces, self.token_budget) if traces else []:
                yield indices, self._reading([pairs[i] for i in indices], self._packed)
            return
        alone = _Alone()
        for i in sorted(range(len(pairs)), key=lambda i: pairs[i].prompt):
            yield [i], self._reading([pairs[i]], alone)

    def _packed(self, model: LanguageModel, pairs: Sequence[EncodedPair]) -> _States:
        batch = pack([_trace(pair, _dense(pair)) for pair in pairs], device=model.device)
        return _States(batch, model.hidden(batch))

    def _reading(self, pairs: Sequence[EncodedPair], run: _Run) -> Reading:
        disc, policy = self.discriminator, self.policy
        of_policy = None if policy is None else run(policy, [_policys(pair) for pair in pairs])
        if disc.body is None:
            assert of_policy is not None
            of_disc = of_policy
        else:
            of_disc = run(disc.body, pairs)
        logp: Tensor | None = None
        if policy is None or of_policy is None:
            f = disc.energies(of_disc.batch, of_disc.hidden)
        elif pairs[0].of_policy is not None:
            f = disc.energies(of_disc.batch, of_disc.hidden)
            logp, _ = policy.logprob(of_policy.hidden, of_policy.batch, self.temperature)
        else:
            scored = disc.score_states(
                of_disc.batch,
                policy,
                of_disc.hidden,
                of_policy.hidden,
                form="logit",
                temperature=self.temperature,
            )
            f, logp = scored.f, scored.logp

        def spans(cut: Cut, policys: Cut) -> tuple[Tensor, Tensor | None]:
            if disc.shaping_gamma is not None:  # h is read at the ends of these spans
                of_spans = disc.energies(of_disc.with_spans(cut), of_disc.hidden)
            elif disc.head_kind == "score":
                of_spans = segment_last(f, _cu(cut, f))
            else:
                of_spans = self._over(f, cut)
            return of_spans, None if logp is None else of_spans - self._over(logp, policys)

        return Reading(f=f, logp=logp, spans=spans)

    def _over(self, values: Tensor, cut: Cut) -> Tensor:
        """Sum (or average, as trained) the values of actions [N] over spans [S]."""
        combine = segment_sum if self.discriminator.span_logp == "sum" else segment_mean
        return combine(values, _cu(cut, values))


@dataclass(frozen=True)
class _States:
    """A batch, each action a span of its own, and a model's hidden states [T, D] of it."""

    batch: PackedBatch
    hidden: Tensor

    def with_spans(self, cut: Cut) -> PackedBatch:
        """The same batch with the actions cut into other spans."""
        lengths = [n for spans in cut for n in spans]
        return replace(
            self.batch,
            cu_spans=offsets(lengths, self.batch.device),
            cu_seq_spans=offsets([len(spans) for spans in cut], self.batch.device),
        )


_Run = Callable[[LanguageModel, Sequence[EncodedPair]], _States]


class _Alone:
    """Runs a pair in two passes; the prompt's is kept for the pairs that follow it."""

    def __init__(self) -> None:
        self._prompts: dict[LanguageModel, tuple[tuple[int, ...], Tensor, Continuation]] = {}

    def __call__(self, model: LanguageModel, pairs: Sequence[EncodedPair]) -> _States:
        (pair,) = pairs
        known = self._prompts.get(model)
        if known is None or known[0] != pair.prompt:
            hidden, prompt = model.continued(torch.tensor(pair.prompt, device=model.device))
            known = self._prompts[model] = (pair.prompt, hidden[-1:].clone(), prompt)
        _, last, prompt = known
        hidden, _ = model.continued(torch.tensor(pair.completion, device=model.device), prompt)
        # Of the prompt, the heads read its last token alone.
        trace = replace(_trace(pair, _dense(pair)), prompt=pair.prompt[-1:])
        return _States(pack([trace], device=model.device), torch.cat([last, hidden]))


def _policys(pair: EncodedPair) -> EncodedPair:
    return pair if pair.of_policy is None else pair.of_policy


def _trace(pair: EncodedPair, lengths: tuple[int, ...]) -> Trace:
    return Trace(prompt=pair.prompt, completion=pair.completion, span_lengths=lengths)


def _dense(pair: EncodedPair) -> tuple[int, ...]:
    return (1,) * len(pair.completion)


def _cu(cut: Cut, values: Tensor) -> Tensor:
    return offsets([n for spans in cut for n in spans], values.device)
