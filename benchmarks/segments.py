"""Cases of the segment operators and of discounted returns: bound by memory, not by arithmetic.

N elements in B sequences. The yardstick is a copy of the N elements into memory that is already
there. The padded formulations get their inputs padded beforehand; padding is not timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import airl_fast
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.lengths import completion_lengths
from tests import oracle

SUM, MEAN, SOFTMAX, RETURNS = (
    "segment_sum",
    "segment_mean",
    "segment_softmax",
    "discounted_returns",
)
OPERATORS = (SUM, MEAN, SOFTMAX, RETURNS)
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_SMALL = (5, 11)  # sequences, length


@dataclass(frozen=True, eq=False)
class SegmentInputs:
    """``x [N]``, ``cu [B+1]`` int32, and gamma for returns."""

    x: Tensor
    cu: Tensor
    gamma: float

    def cpu(self) -> "SegmentInputs":
        """A copy in CPU memory."""
        return SegmentInputs(self.x.cpu(), self.cu.cpu(), self.gamma)

    def padded(self) -> tuple[Tensor, Tensor]:
        """``x`` padded with zeros to ``[B, L]``, and the mask."""
        lengths = self.cu.diff()
        mask = torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]
        padded = self.x.new_zeros(mask.shape)
        padded[mask] = self.x
        return padded, mask


def segment_inputs(
    sequences: int,
    length: int | None,
    gamma: float,
    dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
) -> SegmentInputs:
    """Normal values in sequences of one length, or of GSM8K-like lengths if ``length`` is None."""
    rng = np.random.default_rng(seed)
    lengths = completion_lengths(sequences, rng) if length is None else [length] * sequences
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), generator=generator).to(dtype)
    cu = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    return SegmentInputs(x.to(device), cu.to(device), gamma)


def segment_case(
    operator: str,
    sequences: int,
    dtype: torch.dtype,
    seed: int,
    *,
    length: int | None = None,
    gamma: float = 1.0,
    device: str = "cpu",
) -> Case:
    """One operator over ``sequences`` sequences; ``gamma`` is read by discounted_returns only."""
    make = partial(segment_inputs, sequences, length, gamma, dtype, seed, device)
    inputs = make()
    elements = len(inputs.x)
    results = elements if operator in (SOFTMAX, RETURNS) else sequences
    shape = {"B": sequences, "N": elements, "longest": int(inputs.cu.diff().max())}
    label = f"{operator} (gamma {gamma:g})" if operator == RETURNS else operator
    return Case(
        operator=label,
        shape=shape,
        dtype=dtype,
        inputs=make,
        small=partial(segment_inputs, *_SMALL, gamma, dtype, seed, device),
        oracle=lambda x: _oracle(operator, x.cpu()),
        expected=lambda x: {k: Sampled(v) for k, v in _oracle(operator, x.cpu()).items()},
        yardstick=("copy", _copy),
        variants=_variants(operator, device),
        traffic=elements * dtype.itemsize + 4 * results + 4 * (sequences + 1),
    )


def _copy(inputs: SegmentInputs) -> Callable[[], Tensor]:
    return partial(torch.empty_like(inputs.x).copy_, inputs.x)


def _oracle(operator: str, inputs: SegmentInputs) -> Outputs:
    if operator == RETURNS:
        return {"result": _returns_in_float64(inputs)}
    return {"result": getattr(oracle, operator)(inputs.x, inputs.cu)}


def _returns_in_float64(inputs: SegmentInputs) -> Tensor:
    """What oracle.discounted_returns gives, in floats: its tensor per token takes minutes here."""
    if len(inputs.x) <= 64:
        return oracle.discounted_returns(inputs.x, inputs.cu, inputs.gamma)
    x, returns = inputs.x.double().tolist(), [0.0] * len(inputs.x)
    for start, stop in pairwise(inputs.cu.tolist()):
        following = 0.0
        for i in range(stop - 1, start - 1, -1):
            returns[i] = following = x[i] + inputs.gamma * following
    return torch.tensor(returns, dtype=torch.float64)


def _variants(operator: str, device: str) -> list[Variant]:
    ours = [
        Variant("airl_fast", partial(_ours, operator), b, partial(airl_fast.backend, b))
        for b in BACKENDS[device]
    ]
    peers: Mapping[str, tuple[Callable[[SegmentInputs], Prepared], str]] = _PEERS[operator]
    return [*ours, *(Variant(name, make, note=note) for name, (make, note) in peers.items())]


def _ours(operator: str, inputs: SegmentInputs) -> Prepared:
    if operator == RETURNS:
        return _prepared(airl_fast.discounted_returns, inputs.x, inputs.cu, inputs.gamma)
    return _prepared(getattr(airl_fast, operator), inputs.x, inputs.cu)


def _prepared(function: Callable[..., Tensor], *arguments: Any) -> Prepared:
    return Prepared(partial(function, *arguments), lambda result: {"result": result})


# Peers: plain torch


def _owner(x: Tensor, cu: Tensor) -> Tensor:
    return torch.repeat_interleave(cu.diff(), output_size=len(x))


def _scatter_sum(x: Tensor, cu: Tensor) -> Tensor:
    return x.new_zeros(len(cu) - 1).index_add_(0, _owner(x, cu), x)


def _scatter_mean(x: Tensor, cu: Tensor) -> Tensor:
    return _scatter_sum(x, cu) / cu.diff()


def _scatter_softmax(x: Tensor, cu: Tensor) -> Tensor:
    owner = _owner(x, cu).long()
    largest = x.new_full((len(cu) - 1,), -torch.inf).scatter_reduce_(0, owner, x, "amax")
    raised = (x - largest[owner]).exp()
    return raised / x.new_zeros(len(cu) - 1).index_add_(0, owner, raised)[owner]


def _cumsum_difference(x: Tensor, cu: Tensor) -> Tensor:
    running = torch.cat([x.new_zeros(1), x.cumsum(0)])
    return running[cu[1:]] - running[cu[:-1]]


def _segment_reduce(reduce: str, x: Tensor, cu: Tensor) -> Tensor:
    return torch.segment_reduce(x, reduce, lengths=cu.diff().long())


# Peers: one sequence at a time


def _loop(reduce: Callable[[Tensor], Tensor], join: Callable[..., Tensor]) -> Any:
    def over_sequences(x: Tensor, cu: Tensor) -> Tensor:
        return join([reduce(x[start:stop]) for start, stop in pairwise(cu.tolist())])

    return over_sequences


def _loop_returns(inputs: SegmentInputs) -> Prepared:
    def over_tokens(x: Tensor, cu: Tensor, gamma: float) -> Tensor:
        rewards, offsets = x.tolist(), cu.tolist()
        returns = [0.0] * len(rewards)
        for start, stop in pairwise(offsets):
            following = 0.0
            for i in range(stop - 1, start - 1, -1):
                returns[i] = following = rewards[i] + gamma * following
        return torch.tensor(returns, dtype=x.dtype, device=x.device)

    return _prepared(over_tokens, inputs.x, inputs.cu, inputs.gamma)


# Peers: padded to the longest


def _padded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[SegmentInputs], Prepared]:
    return lambda inputs: _prepared(function, *inputs.padded())


def _padded_softmax(inputs: SegmentInputs) -> Prepared:
    x, mask = inputs.padded()
    return Prepared(
        lambda: x.masked_fill(~mask, -torch.inf).softmax(-1), lambda p: {"result": p[mask]}
    )


def _padded_over_time(inputs: SegmentInputs) -> Prepared:
    x, mask = inputs.padded()

    def scan() -> Tensor:
        returns = torch.empty_like(x)
        following = x.new_zeros(len(x))
        for t in range(x.shape[1] - 1, -1, -1):
            following = x[:, t] + inputs.gamma * following
            returns[:, t] = following
        return returns

    return Prepared(scan, lambda r: {"result": r[mask]})


def _padded_powers(inputs: SegmentInputs) -> Prepared:
    """``R_t = (sum over k >= t of gamma^k r_k) / gamma^t``: 0 / 0 once gamma^t underflows."""
    x, mask = inputs.padded()

    def divided() -> Tensor:
        powers = inputs.gamma ** torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        return (x * powers).flip(1).cumsum(1).flip(1) / powers

    return Prepared(divided, lambda r: {"result": r[mask]})


def _flat(function: Callable[..., Tensor]) -> Callable[[SegmentInputs], Prepared]:
    return lambda inputs: _prepared(function, inputs.x, inputs.cu)


_PADDED = "already padded to the longest"
_LOOP = "over sequences"
_PEERS: dict[str, dict[str, tuple[Callable[[SegmentInputs], Prepared], str]]] = {
    SUM: {
        "plain torch": (_flat(_scatter_sum), "repeat_interleave, index_add_"),
        "torch segment_reduce": (_flat(partial(_segment_reduce, "sum")), ""),
        "torch cumsum": (_flat(_cumsum_difference), "differences of one running sum"),
        "python loop": (_flat(_loop(Tensor.sum, torch.stack)), _LOOP),
        "padded": (_padded(lambda x, mask: (x * mask).sum(1)), _PADDED),
    },
    MEAN: {
        "plain torch": (_flat(_scatter_mean), "repeat_interleave, index_add_"),
        "torch segment_reduce": (_flat(partial(_segment_reduce, "mean")), ""),
        "python loop": (_flat(_loop(Tensor.mean, torch.stack)), _LOOP),
        "padded": (_padded(lambda x, mask: (x * mask).sum(1) / mask.sum(1)), _PADDED),
    },
    SOFTMAX: {
        "plain torch": (_flat(_scatter_softmax), "scatter_reduce_, index_add_"),
        "python loop": (_flat(_loop(partial(torch.softmax, dim=0), torch.cat)), _LOOP),
        "padded": (_padded_softmax, _PADDED),
    },
    RETURNS: {
        "plain torch": (_padded_over_time, "a loop over time, padded beforehand"),
        "python loop": (_loop_returns, "over tokens, in Python floats"),
        "padded": (_padded_powers, "divides by powers of gamma; padded beforehand"),
    },
}
