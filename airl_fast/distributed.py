"""Many processes: who there is, what they tell each other, and models cut in pieces among them.

A run is defined without its number of processes: prompts, seeds and traces are those of one
process. Ranks share the work on them (sampling by prompts, passes by micro-batches), sum their
losses and gradients, and hold every result per trace alike. FSDP2 (``fully_shard``) keeps one
piece of every weight, of its gradient and of AdamW's moments on each rank.

Only ``shard``, ``join`` and what needs another process import torch.distributed: a lone process
pays nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from airl_fast.comparison import AuditError
from airl_fast.loading_checks import default_device, known_device
from airl_fast.ops._deferred import raise_failed
from airl_fast.ops._finite import NonFiniteValueError

T = TypeVar("T")

# What one rank can meet alone in its part of the work, when all that the ranks do together in a
# pass has been done: it is told to the others, so that all of them stop, or skip, at one place.
_TOLD = (NonFiniteValueError, AuditError)

# A rank that waits longer than this for another gives up: the longest that sampling may differ by.
TIMEOUT = timedelta(minutes=30)
_FROM_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. By default it is alone.

    Every method but ``share`` is called by all ranks together, in the same order.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Take this rank's part of a list: every ``size``-th from the ``rank``-th on."""
        return list(items[self.rank :: self.size])

    def sum_(self, values: Tensor) -> Tensor:
        """Replace values by their sum over the ranks, the same bits on each of them."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def totals(self, parts: Mapping[str, float]) -> dict[str, float]:
        """The sum of every number over the ranks."""
        if self.size == 1:
            return dict(parts)
        values = self.sum_(torch.tensor(list(parts.values()), dtype=torch.float64))
        return dict(zip(parts, values.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank. Pickled between processes that trust each other."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def collect(self, parts: Mapping[int, Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Values per trace, float32, of which each rank computed some.

        Args:
            parts: what this rank has, by index; every index is one rank's.
            lengths: of the values of every index.
        """
        if self.size == 1:
            return [parts[i] for i in range(len(lengths))]
        flat = torch.zeros(sum(lengths), device=self.device)
        pieces = list(flat.split(list(lengths)))
        for i, part in parts.items():
            pieces[i].copy_(part)
        self.sum_(flat)  # adding zeros changes nothing
        return pieces

    def first_does(self, function: Callable[[], T]) -> T:
        """What rank 0 gets from a call that no other rank makes; its error is raised on all."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all ranks the error of the first that has one; return where none has."""
        if self.size > 1:
            first = torch.tensor(self.rank if error is not None else self.size)
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
            if first < self.size:
                told = [error]
                torch.distributed.broadcast_object_list(told, int(first))
                error = error if first == self.rank else told[0]
        if error is not None:
            raise error

    def agree(self, function: Callable[[], T]) -> T:
        """Call what works on this rank alone; where a rank meets a value or drift, all raise it.

        Raises:
            NonFiniteValueError, AuditError: of the first rank that met one.
        """
        result, error = _caught(function) if self.size > 1 else (function(), None)
        self.raise_together(error)
        return result  # type: ignore[return-value]

    def check_same(self, what: str, value: object) -> None:
        """Refuse to go on where ranks hold different things, told apart by their ``repr``.

        Raises:
            ValueError: naming what differs, and on which ranks, on all of them.
        """
        if self.size == 1:
            return
        values = self.gather(hashlib.blake2b(repr(value).encode()).hexdigest())
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise ValueError(
                f"expected every process to hold the same {what}, but ranks {others} differ from "
                "rank 0: give all of them the same files, versions and configuration"
            )


def join(device: str | None = None) -> World:
    """Join the processes that torchrun started; alone without it.

    Args:
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one. Among several processes
            each takes the GPU of its LOCAL_RANK. gloo connects CPUs, nccl GPUs.

    Raises:
        ValueError: variables of the launcher are missing, or the device cannot be each process's.
    """
    kind = default_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=known_device(kind))
    missing = [name for name in _FROM_LAUNCHER if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size}, and {', '.join(missing)} not set: start the processes with "
            "torchrun (or accelerate launch), which sets all of them; for one process, unset "
            "WORLD_SIZE"
        )
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    place = torch.device(kind)
    if place.index is not None:
        raise ValueError(
            f"run.device={kind} names one device for {size} processes: set run.device="
            f"{place.type}; each process takes the one of its LOCAL_RANK"
        )
    if place.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs "
                "(--nproc-per-node)"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if not torch.distributed.is_initialized():
        backend = "gloo" if place.type == "cpu" else f"cpu:gloo,{place.type}:nccl"
        torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    return World(rank, size, place)


def leave(world: World) -> None:
    """Part from the other processes, after all of them have come so far."""
    if world.size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _caught(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a call returns, or the error in it that the other ranks are to be told."""
    try:
        result = function()
        raise_failed(wait=True)  # a GPU's checks would raise later, at another place on each rank
        return result, None
    except _TOLD as error:
        return None, error


class _Root(nn.Module):
    """Runs any function where the parameters that belong to no layer (the head's) are whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class Shards:
    """A model whose weights are in pieces, and the way to run it.

    Outside of ``run`` every parameter is a DTensor of which this rank holds a piece. In it, the
    parameters of no layer are whole, those of a layer for as long as the layer runs; a function
    that returns tensors with gradients gets them reduced (summed) over the ranks in ``backward``.

    Args:
        model: a transformers model, or a PEFT model around one; changed in place.
        layers: class names of its layers: each becomes a unit of its own.
        world: more than one process; each has loaded the same weights, on its own device.

    Raises:
        ValueError: the model has no such layer, is elsewhere, or differs between processes.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        units = [module for module in model.modules() if type(module).__name__ in layers]
        if not units:
            raise ValueError(
                f"{type(model).__name__} has no layer of the classes {sorted(layers)}: expected "
                "_no_split_modules to name its decoder layers; run it in one process"
            )
        device = next(model.parameters()).device
        if device != world.device:
            raise ValueError(
                f"expected the weights on this process's device {world.device}, got them on "
                f"{device}: load the model with device=world.device"
            )
        world.check_same("weights", [p.double().norm().item() for p in model.parameters()])
        self.world = world
        self.root: Any = _Root(model)
        self._running = False
        # The root is cut again after its forward pass, unlike FSDP2's default: weights may be set
        # between two passes without a backward, which whole copies would not notice.
        sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in (*units, self.root):
            unit: Any = fully_shard(module, mesh=mesh, mp_policy=sums, reshard_after_forward=True)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)

    def run(self, function: Callable[[], T]) -> T:
        """Call a function with the head whole; calls within calls are plain ones.

        Raises:
            NonFiniteValueError, AuditError: the function raised it on some rank; on all of them.
        """
        if self._running:
            return function()
        self._running = True
        try:
            # Caught within, so that FSDP2 sees the pass end in the same way on every rank.
            result, error = self.root(partial(_caught, function))
        finally:
            self._running = False
        self.world.raise_together(error)
        return result

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every weight whole for as long as the block lasts: forward passes talk to nobody.

        Ranks may then run as many passes as they like, without gradients.
        """
        from torch.distributed.fsdp import FSDPModule

        units: list[Any] = [m for m in self.root.modules() if isinstance(m, FSDPModule)]
        self.root.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            self.root.set_reshard_after_forward(True)
            for unit in units:
                unit.reshard()


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a piece of one (a DTensor)."""
    return hasattr(value, "full_tensor")


def place_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Cut this rank's piece out of a whole tensor, as the parameter is cut; no rank is asked."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(
        value.to(parameter.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors for rank 0 to write: on the CPU where they were in pieces, else as they are.

    All ranks call it with the same names in the same order; the others get nothing. What was one
    tensor under two names (tied weights) is still one.
    """
    found: dict[int, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        if id(tensor) not in found:
            value: Any = tensor.detach()
            if is_sharded(value):
                value = value.full_tensor()
                value = value.cpu() if world.first else None
            found[id(tensor)] = value
        result[name] = found[id(tensor)]
    return result if world.first else {}


def clip_grad_norm_(parameters: Sequence[nn.Parameter], limit: float, world: World) -> float:
    """Scale gradients down to a norm, in place, if it is finite; return the norm before.

    The norm is that of the whole gradient: pieces of sharded parameters are added over the ranks,
    the gradients of others are the same on all of them and count once.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if world.size == 1:
        total = nn.utils.get_total_norm(grads)
        if total.isfinite():
            nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return float(total)
    squares = torch.zeros(2, dtype=torch.float64, device=world.device)
    for grad in grads:
        local = local_piece(grad)
        squares[int(is_sharded(grad))] += local.double().square().sum()
    alone, pieces = squares.unbind()
    norm = float((alone + world.sum_(pieces.clone())).sqrt())
    scale = limit / (norm + 1e-6)  # as torch's clip_grad_norm_
    if math.isfinite(norm) and scale < 1:
        for grad in grads:
            local_piece(grad).mul_(scale)
    return norm


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Add up over the ranks what FSDP2 does not: gradients of parameters that are not sharded."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None and not is_sharded(parameter):
            world.sum_(parameter.grad)


def local_piece(value: Tensor) -> Tensor:
    """The piece of a DTensor that is here, sharing its memory; a plain tensor itself."""
    sharded: Any = value
    piece: Tensor = sharded.to_local() if is_sharded(value) else value
    return piece
