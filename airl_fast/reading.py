"""The models of a scorer, run over encoded pairs: f and log pi of every action.

    P pairs   N actions of them   S spans of them

Packed: a pass takes as many pairs as fit the token budget. On a CPU it is laid out and padded so
that the bits of a score do not depend on what else is in the pass (invariance.py), where the
machine's matrix products allow it.

Alone: every prompt and every completion is a pass of its own, whose shapes are its own lengths and
its prompt's; so its bits are the same whatever else is scored, on any machine. A prompt is run once
for the completions that are scored together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from airl_fast.continuing import Continuation
from airl_fast.discriminator import Discriminator
from airl_fast.encoding import EncodedPair
from airl_fast.invariance import SCORE_COLUMNS, least_rows, padded, widths
from airl_fast.language_model import LanguageModel
from airl_fast.layout import attend_separately
from airl_fast.ops._cpu_head import alike_tiles
from airl_fast.ops.segments import segment_last, segment_mean, segment_sum
from airl_fast.packing import PackedBatch, Trace, pack
from airl_fast.passes import offsets
from airl_fast.planning import plan_traces

Passes = Literal["alone", "packed"]
Cut = Sequence[tuple[int, ...]]  # span lengths of every pair
_CPU_PASS = 2048  # tokens: larger passes gain nothing there, and leave the caches
_PASS = 16384


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one batch of pairs says.

    Attributes:
        f: [N] float32, each action a span of its own.
        logp: [N'] float32 of the policy's actions (N' = N unless its tokenizer is another), or
            None without a policy.
        spans: gives f [S] of spans of the reward's actions, and f - log pi [S], where log pi is of
            as many spans of the policy's, or None.
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
        passes: "packed" or "alone"; None is "packed", but "alone" on a CPU where packed passes
            would not be exact.
        token_budget: tokens of a packed pass; "alone" ignores it. None is 16,384, on a CPU 2,048
            or the longest pair where that is longer.

    Attributes:
        passes: "packed" or "alone".
        token_budget: tokens of a packed pass.
        exact: packed passes are laid out so that bits do not depend on what is packed.
        invariant: the bits of a score do not depend on what is scored with it.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        policy: LanguageModel | None,
        *,
        temperature: float,
        passes: Passes | None,
        token_budget: int | None,
    ) -> None:
        self.discriminator = discriminator
        self.policy = policy
        self.temperature = temperature
        models = [model for model in (discriminator.body, policy) if model is not None]
        on_cpu = all(model.device.type == "cpu" for model in models)
        least: list[int | None] = [None]
        if passes != "alone" and on_cpu and discriminator.shaping_gamma is None:
            least = [least_rows(model.causal_lm) for model in models]
        self._least_rows = max(n or 0 for n in least)
        alike = None not in least
        self.passes: Passes = passes or ("packed" if alike or not on_cpu else "alone")
        self.exact = alike and self.passes == "packed"
        self.invariant = self.exact or self.passes == "alone"
        default = _CPU_PASS if on_cpu else _PASS
        self.token_budget = default if token_budget is None else token_budget
        self._stretch = token_budget is None and on_cpu

    @torch.no_grad()
    def read(self, pairs: Sequence[EncodedPair]) -> Iterator[tuple[list[int], Reading]]:
        """Yield readings of batches of the pairs, with the indices of the pairs in each.

        Raises:
            ValueError: a pair longer than the token budget (packed passes only).
        """
        if self.passes == "packed":
            traces = [_trace(pair, _dense(pair)) for pair in pairs]
            for indices in plan_traces(traces, self._budget(traces)) if traces else []:
                yield indices, self._reading([pairs[i] for i in indices], self._packed)
            return
        alone = _Alone()
        for i in sorted(range(len(pairs)), key=lambda i: pairs[i].prompt):
            yield [i], self._reading([pairs[i]], alone)

    def _budget(self, traces: Sequence[Trace]) -> int:
        if not self._stretch:
            return self.token_budget
        return max(self.token_budget, *(trace.num_tokens for trace in traces))

    def _packed(self, model: LanguageModel, pairs: Sequence[EncodedPair]) -> _States:
        traces = [_trace(pair, _dense(pair)) for pair in pairs]
        batch = pack(traces, device=model.device, lone_prompts=self.exact)
        if not self.exact:
            return _States(batch, model.hidden(batch))
        threads, least = torch.get_num_threads(), self._least_rows
        actions = 0 if batch.num_actions >= least else least + 1 - batch.num_actions
        spare = padded(batch.num_tokens + actions, widths(model.causal_lm), threads, least)
        spare -= batch.num_tokens
        if spare:
            unused = next(i for i in count() if all(pair.prompt != (i,) for pair in pairs))
            filler = Trace(
                prompt=(unused,), completion=(0,) * (spare - 1), span_lengths=(1,) * (spare - 1)
            )
            batch = pack([*traces, filler], device=model.device, lone_prompts=True)
        attend_separately(batch)
        return _States(batch, model.hidden(batch))

    def _reading(self, pairs: Sequence[EncodedPair], run: _Run) -> Reading:
        disc, policy = self.discriminator, self.policy
        actions = sum(len(pair.completion) for pair in pairs)
        of_policy = None if policy is None else run(policy, [p.of_policy or p for p in pairs])
        of_disc = of_policy if disc.body is None else run(disc.body, pairs)
        assert of_disc is not None  # the scorer asks for a policy
        logp: Tensor | None = None
        with alike_tiles() if self.exact else nullcontext():
            if self.exact or of_policy is None or pairs[0].of_policy is not None:
                f = self._dense_f(of_disc)
                if policy is not None and of_policy is not None:
                    logp, _ = policy.logprob(of_policy.hidden, of_policy.batch, self.temperature)
            else:
                assert policy is not None
                scored = disc.score_states(
                    of_disc.batch,
                    policy,
                    of_disc.hidden,
                    of_policy.hidden,
                    form="logit",
                    temperature=self.temperature,
                )
                f, logp = scored.f, scored.logp
        f = f[:actions]  # the filler's come last
        if logp is not None:
            logp = logp[: sum(len((pair.of_policy or pair).completion) for pair in pairs)]

        def spans(cut: Cut, policys: Cut) -> tuple[Tensor, Tensor | None]:
            if disc.shaping_gamma is not None:  # h is read at the ends of these spans
                of_spans = disc.energies(of_disc.with_spans(cut), of_disc.hidden)
            elif disc.head_kind == "score":
                of_spans = segment_last(f, _cu(cut, f))
            else:
                of_spans = self._over(f, cut)
            return of_spans, None if logp is None else of_spans - self._over(logp, policys)

        return Reading(f=f, logp=logp, spans=spans)

    def _dense_f(self, states: _States) -> Tensor:
        """f of every action, as one span each [N]."""
        disc, batch = self.discriminator, states.batch
        if not self.exact or disc.head_kind == "lm":
            return disc.energies(batch, states.hidden)
        # One column would be a product of another kind, whose rows are not computed alike.
        weight = nn.functional.pad(disc.weight, (0, 0, 0, SCORE_COLUMNS - len(disc.weight)))
        rows = nn.functional.linear(states.hidden[batch.action_index].float(), weight)
        return rows[:, 0] + disc.bias[0]

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


def _trace(pair: EncodedPair, lengths: tuple[int, ...]) -> Trace:
    return Trace(prompt=pair.prompt, completion=pair.completion, span_lengths=lengths)


def _dense(pair: EncodedPair) -> tuple[int, ...]:
    return (1,) * len(pair.completion)


def _cu(cut: Cut, values: Tensor) -> Tensor:
    return offsets([n for spans in cut for n in spans], values.device)
