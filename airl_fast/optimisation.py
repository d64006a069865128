"""AdamW with warm-up, cosine decay and gradient clipping, exact to resume."""

import math
from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from airl_fast.distributed import World, clip_grad_norm_, local_piece, sum_gradients
from airl_fast.ops._deferred import raise_failed
from airl_fast.optimizer_state import flatten_optimizer, restore_optimizer
from airl_fast.wide_weights import WideWeights


class NonFiniteGradientError(FloatingPointError):
    """A gradient that is not finite, and the first parameter that has it.

    Attributes:
        parameter: its name; None where every gradient is finite and only their norm overflows.
    """

    def __init__(self, message: str, parameter: str | None) -> None:
        super().__init__(message)
        self.parameter = parameter


class Optimiser:
    """AdamW over named parameters; the rate is a function of the number of updates made.

    Those of fewer than 32 bits are updated through float32 copies (`WideWeights`). An update is
    ``clear``, then ``collect`` after each micro-batch's backward, then ``step``.

    Args:
        parameters: what is trained at ``learning_rate``, with weight decay.
        learning_rate: the highest rate.
        head: what is trained at ``head_learning_rate``, without weight decay.
        head_learning_rate: its rate.
        weight_decay: decoupled weight decay.
        betas: AdamW's.
        clip_norm: the gradient's norm is scaled down to this.
        warmup: updates over which the rate rises linearly.
        updates: updates over which it falls by a cosine to ``final_fraction``; None: constant.
        final_fraction: share of the rate that is left at the end.
        world: the processes whose gradients add up. Those of sharded parameters have been added
            by ``backward``, the others are here.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        head: Mapping[str, nn.Parameter] | None = None,
        head_learning_rate: float = 0.0,
        weight_decay: float,
        betas: tuple[float, float],
        clip_norm: float,
        warmup: int = 0,
        updates: int | None = None,
        final_fraction: float = 1.0,
        world: World | None = None,
    ) -> None:
        self.names = [*parameters, *(head or {})]
        self.parameters = [*parameters.values(), *(head or {}).values()]
        self.world = world or World()
        self.clip_norm = clip_norm
        self.warmup = warmup
        self.total = updates
        self.final_fraction = final_fraction
        self.updates = 0
        self.retired = False
        groups = [(parameters, weight_decay, learning_rate), (head or {}, 0.0, head_learning_rate)]
        self._groups = [(len(named), decay, rate) for named, decay, rate in groups if named]
        self._betas = betas

    @cached_property
    def wide(self) -> WideWeights:
        """What AdamW updates; made when the first gradient is collected."""
        return WideWeights(self.parameters)

    @cached_property
    def adamw(self) -> torch.optim.AdamW:
        """Made when the first update is."""
        updated, groups = iter(self.wide.updated), []
        for count, decay, rate in self._groups:
            groups.append(
                {"params": list(islice(updated, count)), "weight_decay": decay, "lr": rate}
            )
        return torch.optim.AdamW(groups, betas=self._betas, fused=True)  # one pass, no temporaries

    def rate_factor(self) -> float:
        """Share of the highest rate that the next update uses."""
        if self.updates < self.warmup:
            return (self.updates + 1) / self.warmup
        if self.total is None:
            return 1.0
        progress = (self.updates - self.warmup) / max(1, self.total - self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1.0 - self.final_fraction) * cosine

    def clear(self) -> None:
        """Drop all gradients: what an update that failed has left."""
        for p in (*self.parameters, *(self.wide.updated if "wide" in vars(self) else ())):
            p.grad = None

    def collect(self) -> None:
        """Add up the gradients that a backward has left."""
        self.wide.collect()

    def step(self) -> float:
        """Clip, update, clear the gradients; return the gradient's norm before clipping.

        Raises:
            NonFiniteGradientError: naming the first parameter whose gradient is not finite; the
                weights are left as they were.
        """
        if self.retired:
            raise RuntimeError("an optimiser that was retired makes no more updates")
        self.wide.collect()
        sum_gradients(self.wide.updated, self.world)
        norm = clip_grad_norm_(self.wide.updated, self.clip_norm, self.world)
        # Reading the norm has waited for the GPU: what it found wrong is known.
        self.world.agree(raise_failed)
        if not math.isfinite(norm):
            error = self._non_finite(norm)
            self.clear()
            raise error
        factor = self.rate_factor()
        for group, (_, _, rate) in zip(self.adamw.param_groups, self._groups, strict=True):
            group["lr"] = rate * factor
        self.wide.adopt()
        self.adamw.step()
        self.wide.publish()
        self.clear()
        self.updates += 1
        return norm

    def _non_finite(self, norm: float) -> NonFiniteGradientError:
        pairs = zip(self.names, self.wide.updated, strict=True)
        bad = (
            name
            for name, p in pairs
            if p.grad is not None and not bool(local_piece(p.grad).isfinite().all())
        )
        found = [name for name in self.world.gather(next(bad, None)) if name is not None]
        parameter = min(found, key=self.names.index, default=None)
        first = f"first in {parameter}" if parameter else "though every gradient is finite"
        return NonFiniteGradientError(
            f"the gradient's norm is {norm} at update {self.updates}: expected a finite number "
            f"({first}); lower the learning rate, or look for extreme rewards in the metrics",
            parameter,
        )

    def retire(self) -> None:
        """Free the moments and copies of an optimiser that makes no more updates."""
        self.retired = True
        for made in ("adamw", "wide"):
            vars(self).pop(made, None)

    def state(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a checkpoint needs: tensors, and JSON-able values."""
        if self.retired or "adamw" not in vars(self):
            return {}, {"updates": self.updates, "adamw": None, "retired": self.retired}
        tensors, scalars = flatten_optimizer(self.adamw, prefix)
        values = {"updates": self.updates, "adamw": scalars, "retired": False}
        return tensors | self.wide.state(prefix), values

    def restore(self, tensors: Mapping[str, Tensor], state: Any, prefix: str) -> None:
        """Set what ``state`` gave."""
        self.retire()
        self.updates, self.retired = state["updates"], state.get("retired", False)
        if state["adamw"] is None:
            return
        restore_optimizer(self.adamw, tensors, state["adamw"], prefix)
        self.wide.restore(tensors, prefix)
