"""Inputs of the operators over the language-model head, flat and padded.

N rows (actions), B sequences, L longest sequence, D hidden size, V vocabulary, S spans.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.lengths import offsets_covering
from benchmarks.truth import HeadTruth, head_truth

_SAMPLES = 16  # rows, and tokens, whose gradients are checked
_SPAN = 12.0  # mean actions of a span


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """What every operator over the head reads.

    Attributes:
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64.
        cu_seqs: [B+1] int32, GSM8K-like completions that fill N.
        cu_spans: [S+1] int32.
        d_logp: [N] upstream gradient of the log-probabilities.
        advantages: [N], the same throughout a sequence.
        disc_hidden: [N, D] hidden states of the discriminator.
        disc_row: [1, D] its score head.
        noise: [N] of the sampling policy's log-probabilities, so that some ratios are clipped.
        rows: rows whose gradients are checked.
        ids: tokens whose rows of d weight are checked; half of them are targets.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqs: Tensor
    cu_spans: Tensor
    d_logp: Tensor
    advantages: Tensor
    disc_hidden: Tensor
    disc_row: Tensor
    noise: Tensor
    rows: Tensor
    ids: Tensor

    def cpu(self) -> "HeadInputs":
        """A copy in CPU memory."""
        return HeadInputs(**{f.name: getattr(self, f.name).cpu() for f in fields(self)})

    @cached_property
    def truth(self) -> HeadTruth:
        """The policy's head in float64."""
        return head_truth(self.hidden, self.weight, self.targets)

    @cached_property
    def disc_weight(self) -> Tensor:
        """[V, D]: a language-model head for the discriminator."""
        return self.weight.flip(0) * 0.75

    @cached_property
    def old_logp(self) -> Tensor:
        """[N] float32 log-probabilities at sampling."""
        return (self.truth.logp + self.noise).float()


@lru_cache(maxsize=1)  # cases are ordered by shape, and inputs of one shape are large
def head_inputs(
    n: int, v: int, d: int, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> HeadInputs:
    """Logits with a standard deviation of 3, so that probabilities are neither flat nor spiked."""
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def pick(count: int, high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    weight = normal(v, d).mul_(3 / d**0.5)
    targets = pick(n, v)

    def offsets(*mean: float) -> Tensor:
        return torch.tensor(offsets_covering(n, rng, *mean), dtype=torch.int32, device=device)

    cu_seqs = offsets()
    lengths = cu_seqs.diff()
    return HeadInputs(
        hidden=normal(n, d).to(dtype),
        weight=weight.to(dtype),
        targets=targets,
        cu_seqs=cu_seqs,
        cu_spans=offsets(_SPAN),
        d_logp=normal(n) / n,
        advantages=normal(len(lengths)).repeat_interleave(lengths),
        disc_hidden=normal(n, d).to(dtype),
        disc_row=(normal(1, d) / d**0.5).to(dtype),
        noise=normal(n) * 0.2,
        rows=pick(min(n, _SAMPLES), n),
        ids=torch.cat([targets[: _SAMPLES // 2], pick(_SAMPLES // 2, v)]).unique(),
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """The same inputs flat, [N], or padded to the longest sequence, [B, L].

    Attributes:
        hidden, targets, d_logp, advantages, old_logp, disc_hidden: as in HeadInputs, laid out.
        mask: which positions are actions; None when all are.
        flat: takes what is [N] or [B, L] (and more dimensions behind) to [N].
    """

    hidden: Tensor
    targets: Tensor
    d_logp: Tensor
    advantages: Tensor
    old_logp: Tensor
    disc_hidden: Tensor
    mask: Tensor | None
    flat: Callable[[Tensor], Tensor]


def flat_layout(inputs: HeadInputs, *, block: int | None = None) -> Layout:
    """No padding; with ``block``, and N a multiple of it, as [N / block, block]."""
    n = len(inputs.hidden)
    lead = (-1, block) if block and n % block == 0 else (n,)

    def laid(x: Tensor) -> Tensor:
        return x.reshape(*lead, *x.shape[1:])

    return _laid_out(inputs, laid, None, lambda x: x.reshape(n, *x.shape[len(lead) :]))


def padded_layout(inputs: HeadInputs) -> Layout:
    """Pad every sequence to the longest, as trainers without packing hold their batches."""
    lengths = inputs.cu_seqs.diff()
    mask = torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]

    def laid(x: Tensor) -> Tensor:
        padded = x.new_zeros((*mask.shape, *x.shape[1:]))
        padded[mask] = x
        return padded

    return _laid_out(inputs, laid, mask, lambda x: x[mask])


def _laid_out(
    inputs: HeadInputs,
    laid: Callable[[Tensor], Tensor],
    mask: Tensor | None,
    flat: Callable[[Tensor], Tensor],
) -> Layout:
    return Layout(
        hidden=laid(inputs.hidden),
        targets=laid(inputs.targets),
        d_logp=laid(inputs.d_logp),
        advantages=laid(inputs.advantages),
        old_logp=laid(inputs.old_logp),
        disc_hidden=laid(inputs.disc_hidden),
        mask=mask,
        flat=flat,
    )
