"""Cases of the segment operators and of discounted returns: bound by memory, not by arithmetic.

N elements in B sequences. The yardstick is a copy of the N elements into memory that is already
there. The padded formulations get their inputs padded beforehand; padding is not timed.
"""

from collections.abc import Callable
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

SUM, MEAN, LAST, SOFTMAX, RETURNS = (
    "segment_sum",
    "segment_mean",
    "segment_last",
    "segment_softmax",
    "discounted_returns",
)
OPERATORS = (SUM, MEAN, LAST, SOFTMAX, RETURNS)
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_SMALL = (5, 11)  # sequences, length


@dataclass(frozen=True, eq=False)
class SegmentInputs:
    """``x [N]``, ``cu [B+1]`` int32, gamma for returns, and ``upstream [N]`` for gradients."""

    x: Tensor
    cu: Tensor
    gamma: float
    upstream: Tensor

    def cpu(self) -> "SegmentInputs":
        """A copy in CPU memory."""
        return SegmentInputs(self.x.cpu(), self.cu.cpu(), self.gamma, self.upstream.cpu())

    def padded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``[N]`` padded with zeros to ``[B, L]``, and the mask."""
        lengths = self.cu.diff()
        mask = torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]
        padded = values.new_zeros(mask.shape)
        padded[mask] = values
        return padded, mask

    def ends(self) -> Tensor:
        """Index of the last element of each sequence, ``[B]``."""
        return self.cu[1:].long() - 1


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
    x, upstream = torch.randn(2, sum(lengths), generator=generator).to(dtype)
    cu = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    return SegmentInputs(x.to(device), cu.to(device), gamma, upstream.to(device))


def segment_case(
    operator: str,
    sequences: int,
    dtype: torch.dtype,
    seed: int,
    *,
    length: int | None = None,
    gamma: float = 1.0,
    gradient: bool = False,
    device: str = "cpu",
) -> Case:
    """One operator over ``sequences`` sequences; ``gamma`` is read by discounted_returns only.

    With ``gradient`` a call is the operator and its gradient at given upstream gradients.
    """
    make = partial(segment_inputs, sequences, length, gamma, dtype, seed, device)
    inputs = make()
    elements = len(inputs.x)
    results = elements if operator in _PER_ELEMENT else sequences
    shape = {"B": sequences, "N": elements, "longest": int(inputs.cu.diff().max())}
    modes = [f"gamma {gamma:g}"] * (operator == RETURNS) + ["gradient"] * gradient
    label = f"{operator} ({', '.join(modes)})" if modes else operator
    moved = elements * dtype.itemsize + 4 * results  # gradients read and write as much again
    return Case(
        operator=label,
        shape=shape,
        dtype=dtype,
        inputs=make,
        small=partial(segment_inputs, *_SMALL, gamma, dtype, seed, device),
        oracle=lambda x: _oracle(operator, gradient, x.cpu()),
        expected=lambda x: {k: Sampled(v) for k, v in _oracle(operator, gradient, x.cpu()).items()},
        yardstick=("copy", _copy),
        variants=_variants(operator, gradient, device),
        traffic=moved * (2 if gradient else 1) + 4 * (sequences + 1),
    )


def _copy(inputs: SegmentInputs) -> Callable[[], Tensor]:
    return partial(torch.empty_like(inputs.x).copy_, inputs.x)


def _oracle(operator: str, gradient: bool, inputs: SegmentInputs) -> Outputs:
    if operator == RETURNS:
        if len(inputs.x) > 64:
            return {"result": _scan_in_float64(inputs, gradient)}
        truth = partial(oracle.discounted_returns, gamma=inputs.gamma)
    else:
        truth = getattr(oracle, operator)
    if not gradient:
        return {"result": truth(inputs.x, inputs.cu)}
    gradients = []  # one sequence at a time: a slice of all of x has a gradient as long as x
    for s, (start, stop) in enumerate(pairwise(inputs.cu.tolist())):
        leaf = inputs.x[start:stop].double().requires_grad_()
        at = slice(start, stop) if operator in _PER_ELEMENT else slice(s, s + 1)
        result = truth(leaf, torch.tensor([0, stop - start]))
        gradients += torch.autograd.grad(result, leaf, inputs.upstream[at].double())
    return {"result": torch.cat(gradients)}


def _scan_in_float64(inputs: SegmentInputs, forwards: bool) -> Tensor:
    """What oracle.discounted_returns gives, in floats: its tensor per token takes minutes here.

    Its gradient is the same scan of the upstream gradients, ``forwards`` in time.
    """
    values = (inputs.upstream if forwards else inputs.x).double().tolist()
    out, offsets = [0.0] * len(values), inputs.cu.tolist()
    for start, stop in pairwise(offsets):
        carried = 0.0
        for i in range(start, stop) if forwards else range(stop - 1, start - 1, -1):
            out[i] = carried = values[i] + inputs.gamma * carried
    return torch.tensor(out, dtype=torch.float64)


@dataclass(frozen=True)
class Peer:
    """A formulation in torch: ``function(x, other)``, returns with ``gamma`` as a third.

    Attributes:
        function: of x and what ``takes`` names: "cu", "ends" (int64, made beforehand), or "mask":
            then x and the results per element are padded beforehand.
        differentiable: whether it is timed with its gradient, too.
    """

    function: Callable[..., Tensor]
    takes: str = "cu"
    note: str = ""
    differentiable: bool = True

    def prepare(self, operator: str, gradient: bool, inputs: SegmentInputs) -> Prepared:
        """The call on inputs as this formulation wants them."""
        count = len(inputs.x) if operator in _PER_ELEMENT else len(inputs.cu) - 1
        x, upstream, other = inputs.x, inputs.upstream[:count], inputs.cu
        inside, everything = None, None
        if self.takes == "ends":
            other = inputs.ends()
        elif self.takes == "mask":
            x, other = inputs.padded(x)
            inside = other
            if operator in _PER_ELEMENT:
                upstream, everything = inputs.padded(upstream)[0], other
        options = {"gamma": inputs.gamma} if operator == RETURNS else {}
        run = partial(self.function, **options)
        if not gradient:
            return Prepared(
                lambda: run(x, other),
                lambda y: {"result": y if everything is None else y[everything]},
            )
        leaf = x.clone().requires_grad_()
        return Prepared(
            lambda: torch.autograd.grad(run(leaf, other), leaf, upstream)[0],
            lambda g: {"result": g if inside is None else g[inside]},
        )


def _variants(operator: str, gradient: bool, device: str) -> list[Variant]:
    ours = Peer(getattr(airl_fast, operator))
    return [
        *(
            Variant(
                "airl_fast",
                partial(ours.prepare, operator, gradient),
                b,
                partial(airl_fast.backend, b),
            )
            for b in BACKENDS[device]
        ),
        *(
            Variant(name, partial(peer.prepare, operator, gradient), note=peer.note)
            for name, peer in _PEERS[operator].items()
            if peer.differentiable or not gradient
        ),
    ]


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
        return join([reduce(piece) for piece in x.split(cu.diff().tolist())])

    return over_sequences


def _loop_returns(x: Tensor, cu: Tensor, gamma: float) -> Tensor:
    rewards, offsets = x.tolist(), cu.tolist()
    returns = [0.0] * len(rewards)
    for start, stop in pairwise(offsets):
        following = 0.0
        for i in range(stop - 1, start - 1, -1):
            returns[i] = following = rewards[i] + gamma * following
    return torch.tensor(returns, dtype=x.dtype, device=x.device)


# Peers: padded to the longest


def _padded_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, -torch.inf).softmax(-1)


def _padded_over_time(x: Tensor, mask: Tensor, gamma: float) -> Tensor:
    returns = torch.empty_like(x)
    following = x.new_zeros(len(x))
    for t in range(x.shape[1] - 1, -1, -1):
        following = x[:, t] + gamma * following
        returns[:, t] = following
    return returns


def _padded_powers(x: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``R_t = (sum over k >= t of gamma^k r_k) / gamma^t``: 0 / 0 once gamma^t underflows."""
    powers = gamma ** torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    return (x * powers).flip(1).cumsum(1).flip(1) / powers


_PER_ELEMENT = (SOFTMAX, RETURNS)
_PADDED, _ZEROS = "already padded to the longest", "already padded to the longest, with zeros"
_LOOP = "over sequences"
_PEERS: dict[str, dict[str, Peer]] = {
    SUM: {
        "plain torch": Peer(_scatter_sum, note="repeat_interleave, index_add_"),
        "torch segment_reduce": Peer(partial(_segment_reduce, "sum")),
        "torch cumsum": Peer(_cumsum_difference, note="differences of one running sum"),
        "python loop": Peer(_loop(Tensor.sum, torch.stack), note=_LOOP),
        "padded": Peer(lambda x, mask: (x * mask).sum(1), "mask", _PADDED),
        "zero-padded": Peer(lambda x, mask: x.sum(1), "mask", _ZEROS),
    },
    MEAN: {
        "plain torch": Peer(_scatter_mean, note="repeat_interleave, index_add_"),
        "torch segment_reduce": Peer(partial(_segment_reduce, "mean")),
        "python loop": Peer(_loop(Tensor.mean, torch.stack), note=_LOOP),
        "padded": Peer(lambda x, mask: (x * mask).sum(1) / mask.sum(1), "mask", _PADDED),
    },
    LAST: {
        "plain torch": Peer(lambda x, cu: x[cu[1:].long() - 1], note="indexed"),
        "torch index_select": Peer(
            lambda x, ends: x.index_select(0, ends), "ends", "the index made beforehand"
        ),
        "python loop": Peer(_loop(lambda piece: piece[-1], torch.stack), note=_LOOP),
    },
    SOFTMAX: {
        "plain torch": Peer(_scatter_softmax, note="scatter_reduce_, index_add_"),
        "python loop": Peer(_loop(partial(torch.softmax, dim=0), torch.cat), note=_LOOP),
        "padded": Peer(_padded_softmax, "mask", _PADDED),
    },
    RETURNS: {
        "plain torch": Peer(
            _padded_over_time, "mask", "a loop over time, padded beforehand", differentiable=False
        ),
        "python loop": Peer(
            _loop_returns, note="over tokens, in Python floats", differentiable=False
        ),
        "padded": Peer(_padded_powers, "mask", "divides by powers of gamma; padded beforehand"),
    },
}
