"""Passes over traces without gradients, cut into micro-batches by a token budget.

Values come back per trace, in the order of the traces: they do not depend on the cut, nor on how
many processes shared the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from airl_fast.discriminator import Discriminator
from airl_fast.language_model import LanguageModel
from airl_fast.ops.segments import segment_sum
from airl_fast.packing import PackedBatch, Trace, pack
from airl_fast.planning import plan_traces
from airl_fast.transfers import sent


def micro_batches(
    traces: Sequence[Trace], token_budget: int, model: LanguageModel
) -> Iterator[tuple[list[int], PackedBatch, float]]:
    """Pack this process's part of the traces, at most ``token_budget`` tokens at a time.

    Yields:
        Indices, batch, and the weight of its losses: 1, or 0 for a stand-in. Every process is
        given as many batches as the others, since each pass is one that all of them make together.
    """
    world = model.world
    plan = plan_traces(traces, token_budget, ranks=world.size)
    for turn in range(0, len(plan), world.size):
        mine = turn + world.rank
        indices = plan[mine] if mine < len(plan) else plan[0]
        batch = pack([traces[i] for i in indices], device=model.device)
        yield indices, batch, float(mine < len(plan))


@torch.no_grad()
def action_logp(
    policy: LanguageModel, traces: Sequence[Trace], token_budget: int, temperature: float = 1.0
) -> list[Tensor]:
    """log pi of every action of every trace: one tensor [len(completion)] per trace."""

    def logprob(batch: PackedBatch) -> Tensor:
        return policy.logprob(policy.hidden(batch), batch, temperature)[0]

    result: dict[int, Tensor] = {}
    for indices, batch, weight in micro_batches(traces, token_budget, policy):
        parts = policy.inside(logprob, batch).split(batch.on_cpu.cu_actions.diff().tolist())
        if weight:
            result |= zip(indices, parts, strict=True)
    return policy.world.collect(result, [len(trace.completion) for trace in traces])


@torch.no_grad()
def span_energies(
    discriminator: Discriminator,
    policy: LanguageModel,
    traces: Sequence[Trace],
    token_budget: int,
) -> list[Tensor]:
    """f of every span of every trace: one tensor [spans] per trace."""
    result: dict[int, Tensor] = {}
    for indices, batch, weight in micro_batches(traces, token_budget, policy):
        hidden = policy.hidden(batch) if discriminator.trunk == "policy" else None
        parts = discriminator.f(batch, hidden).split(batch.on_cpu.cu_seq_spans.diff().tolist())
        if weight:
            result |= zip(indices, parts, strict=True)
    return policy.world.collect(result, [len(trace.span_lengths) for trace in traces])


def per_trace_sum(values: Sequence[Tensor]) -> Tensor:
    """The sum of each trace's values, [len(values)]: of f over spans, the undiscounted return."""
    lengths = [len(part) for part in values]
    return segment_sum(torch.cat(list(values)), offsets(lengths, values[0].device))


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """CSR offsets [n + 1] int32 of segments of these lengths."""
    return sent(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
