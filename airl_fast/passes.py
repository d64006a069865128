"""Passes over traces without gradients, cut into micro-batches by a token budget.

Values come back per trace, in the order of the traces: they do not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from airl_fast.loading import LanguageModel
from airl_fast.models import Discriminator
from airl_fast.ops.segments import segment_sum
from airl_fast.packing import PackedBatch, Trace, pack, plan_traces


def micro_batches(
    traces: Sequence[Trace], token_budget: int, device: torch.device
) -> Iterator[tuple[list[int], PackedBatch]]:
    """The traces as packed batches of at most ``token_budget`` tokens, with their indices."""
    for indices in plan_traces(traces, token_budget):
        yield indices, pack([traces[i] for i in indices], device=device)


@torch.no_grad()
def action_logp(
    policy: LanguageModel, traces: Sequence[Trace], token_budget: int, temperature: float = 1.0
) -> list[Tensor]:
    """log pi of every action of every trace: one tensor [len(completion)] per trace."""
    result: list[Tensor] = [torch.empty(0)] * len(traces)
    for indices, batch in micro_batches(traces, token_budget, policy.device):
        logp, _ = policy.logprob(policy.hidden(batch), batch, temperature)
        parts = logp.split(batch.cu_actions.diff().tolist())
        for i, part in zip(indices, parts, strict=True):
            result[i] = part
    return result


@torch.no_grad()
def span_energies(
    discriminator: Discriminator,
    policy: LanguageModel,
    traces: Sequence[Trace],
    token_budget: int,
) -> list[Tensor]:
    """f of every span of every trace: one tensor [spans] per trace."""
    result: list[Tensor] = [torch.empty(0)] * len(traces)
    for indices, batch in micro_batches(traces, token_budget, policy.device):
        hidden = policy.hidden(batch) if discriminator.trunk == "policy" else None
        parts = discriminator.f(batch, hidden).split(batch.cu_seq_spans.diff().tolist())
        for i, part in zip(indices, parts, strict=True):
            result[i] = part
    return result


def per_trace_sum(values: Sequence[Tensor]) -> Tensor:
    """The sum of each trace's values, [len(values)]: of f over spans, the undiscounted return."""
    lengths = [len(part) for part in values]
    return segment_sum(torch.cat(list(values)), offsets(lengths, values[0].device))


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """CSR offsets [n + 1] int32 of segments of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
