"""What each process of tests/ops/test_vocab_parallel.py does: every case, one after the other.

Without pytest and its kind, so that a process starts quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import airl_fast
from airl_fast import vocab_parallel_linear_logprob
from airl_fast.ops import _head

N, D = 13, 6
UNEVEN = {2: [26, 11], 3: [5, 1, 31]}


@dataclass(frozen=True)
class Case:
    """One call, whole: `Shards` cuts it up."""

    head: dict[str, Any] = field(default_factory=dict)
    sizes: dict[int, list[int]] = field(default_factory=lambda: UNEVEN)
    dtype: torch.dtype = torch.float32
    backend: str | None = None
    bias: bool = True
    entropy: bool = True
    only_entropy: bool = False  # nothing is made of logp
    ignore_index: int = -100
    magnitude: float = 1.0
    masked: int = 0  # last rows of the vocabulary, by a bias of -1e4
    needs: tuple[bool, bool, bool] = (True, True, True)
    rows: int = N
    ranks: tuple[int, ...] = (2, 3)

    def inputs(self, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Hidden, the whole weight, targets and the whole bias."""
        g, vocab = torch.Generator().manual_seed(ranks), sum(self.sizes[ranks])
        hidden = self.magnitude * torch.randn(self.rows, D, generator=g)
        weight, bias = torch.randn(vocab, D, generator=g), torch.randn(vocab, generator=g)
        if self.masked:
            bias[-self.masked :] = -1e4
        targets = torch.randint(0, vocab - self.masked, (self.rows,), generator=g)
        targets[::4] = self.ignore_index
        return (
            hidden.to(self.dtype),
            weight.to(self.dtype),
            targets,
            bias.to(self.dtype) if self.bias else None,
        )

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Gradients at logp and entropy."""
        d_logp, d_entropy = torch.randn(2, self.rows, generator=torch.Generator().manual_seed(5))
        return d_logp, d_entropy


def cases() -> dict[str, Case]:
    """The calls that are compared with the oracle."""
    everything = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 1.7}
    found = {
        "plain": Case(bias=False, entropy=False),
        "bias": Case(),
        "temperature": Case({"temperature": 0.7}),
        "softcap": Case({"softcap": 3.0}),
        "everything": Case(everything),
        "logp alone": Case(everything, entropy=False),
        "entropy alone": Case(everything, only_entropy=True),
        "an ignored token of the vocabulary": Case(ignore_index=3),
        "frozen head": Case(everything, entropy=False, needs=(True, False, False)),
        "frozen hidden": Case(everything, needs=(False, True, True)),
        "only the bias": Case(needs=(False, False, True)),
        "no gradient": Case(everything, needs=(False, False, False)),
        "large logits": Case(magnitude=300.0),
        "masked rows": Case(masked=13),
        "one row": Case(rows=1),
        "no row": Case(rows=0),
        "bfloat16": Case(everything, dtype=torch.bfloat16),
        "float64": Case(everything, dtype=torch.float64),
        "reference": Case(everything, backend="reference"),
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = f"triton {str(dtype).removeprefix('torch.')}"
        found[name] = Case(everything, dtype=dtype, backend="triton", rows=5, ranks=(2,))
    return found


def shard(case: Case, ranks: int, rank: int) -> dict[str, Any]:
    """The arguments of this rank's call."""
    hidden, weight, targets, bias = case.inputs(ranks)
    stop = list(accumulate(case.sizes[ranks]))[rank]
    mine = slice(stop - case.sizes[ranks][rank], stop)
    leaves = [hidden, weight[mine], None if bias is None else bias[mine]]
    for leaf, need in zip(leaves, case.needs, strict=True):
        if leaf is not None:
            leaf.requires_grad_(need)
    return {
        "hidden": leaves[0],
        "weight": leaves[1],
        "targets": targets,
        "bias": leaves[2],
        "ignore_index": case.ignore_index,
        "return_entropy": case.entropy,
        **case.head,
    }


def run(case: Case, ranks: int, rank: int, group: Any) -> list[Tensor]:
    """Logp, entropy (if asked for) and the gradients that are wanted."""
    call = shard(case, ranks, rank)
    outputs = vocab_parallel_linear_logprob(**call, group=group)
    outputs = outputs if case.entropy else (outputs,)
    wanted = [x for x in (call["hidden"], call["weight"], call["bias"]) if x is not None]
    wanted = [x for x in wanted if x.requires_grad]
    if not wanted:
        return list(outputs)
    pairs = list(zip(outputs, case.upstream(), strict=False))[int(case.only_entropy) :]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
    return [x.detach() for x in (*outputs, *grads)]


def fault(name: str, call: dict[str, Any], rank: int) -> dict[str, Any]:
    """The arguments of a call that rank 1 (or every rank) gets wrong."""
    if name == "target out of range":
        targets = call["targets"].clone()
        targets[1] = 37
        return {**call, "targets": targets}
    if rank != 1:
        return call
    hidden, weight, bias = (call[key].detach() for key in ("hidden", "weight", "bias"))
    changed: dict[str, dict[str, Any]] = {
        "rows": {"hidden": hidden[:-1].requires_grad_(), "targets": call["targets"][:-1]},
        "width": {"hidden": hidden[:, :-1].clone().requires_grad_(), "weight": weight[:, :-1]},
        "targets": {"targets": call["targets"].flip(0)},
        "bias": {"bias": None},
        "temperature": {"temperature": 0.5},
        "softcap": {"softcap": 2.0},
        "ignore_index": {"ignore_index": -1},
        "entropy": {"return_entropy": False},
        "gradient": {"hidden": hidden},
        "dtype of the targets": {"targets": call["targets"].int()},
        "an empty shard": {"weight": weight[:0], "bias": bias[:0]},
        "not finite": {"weight": weight.clone().fill_(float("nan"))},
        "backend": {"hidden": hidden.double().requires_grad_()},
        "no tensor": {"targets": call["targets"].tolist()},
    }
    return {**call, **changed[name]}


FAULTS = (
    "target out of range", "rows", "width", "targets", "bias", "temperature", "softcap",
    "ignore_index", "entropy", "gradient", "dtype of the targets", "an empty shard", "not finite",
    "backend", "no tensor",
)  # fmt: skip


def refused(name: str, rank: int) -> str:
    """What this rank raises, as ``Type: message``."""
    try:
        with airl_fast.backend("cpu"):
            vocab_parallel_linear_logprob(**fault(name, shard(Case(), 3, rank), rank))
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Largest(TorchDispatchMode):
    """Notes the elements of the largest floating tensor that any call of torch returns."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.seen = max(self.seen, value.untyped_storage().nbytes() // value.itemsize)
        return result


def largest(rank: int, backend: str) -> int:
    """Elements of the largest buffer of a call and its gradients: N = 600, V_r = 300."""
    case = Case({"softcap": 5.0}, sizes={3: [300, 300, 300]}, rows=600)
    whole, _head.CHUNK_BYTES = _head.CHUNK_BYTES, 2**16
    try:
        with airl_fast.backend(backend), Largest() as mode:
            run(case, 3, rank, None)
    finally:
        _head.CHUNK_BYTES = whole
    return mode.seen


def loss_parallel(rank: int, case: Case) -> list[Tensor]:
    """Logp and the gradients at hidden and this rank's weight, by torch's own sharded loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel as parallel

    call, (d_logp, _) = shard(case, 3, rank), case.upstream()
    mesh = init_device_mesh("cpu", (3,))
    temperature = case.head["temperature"]
    with parallel():
        logits = call["hidden"] @ call["weight"].T / temperature
        whole = DTensor.from_local(logits, mesh, [Shard(1)])
        loss = torch.nn.functional.cross_entropy(
            whole, call["targets"], reduction="none", ignore_index=case.ignore_index
        )
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        (loss * -d_logp).sum().backward()
    d_hidden = call["hidden"].grad
    dist.all_reduce(d_hidden)
    return [-loss.detach(), d_hidden, call["weight"].grad]


PEER = Case({"temperature": 0.7}, sizes={3: [12, 12, 12]}, bias=False, entropy=False)


def work(rank: int, folder: Path) -> None:
    """Run everything in a group of three, and in one of the first two; write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=3,
        timeout=timedelta(minutes=10),
    )
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {}
    for name, case in cases().items():
        for ranks, group in ((2, pair), (3, None)):
            if ranks in case.ranks and rank < ranks:
                if case.backend is None:
                    found[f"{name}, {ranks}"] = run(case, ranks, rank, group)
                else:
                    with airl_fast.backend(case.backend):
                        found[f"{name}, {ranks}"] = run(case, ranks, rank, group)
    for name in FAULTS:
        found[f"fault: {name}"] = refused(name, rank)
    for backend in ("cpu", "reference"):
        found[f"largest: {backend}"] = largest(rank, backend)
    found["ours"] = run(PEER, 3, rank, None)
    found["loss_parallel"] = loss_parallel(rank, PEER)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
