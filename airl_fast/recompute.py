"""Decoder layers that compute their activations again in the backward pass, to keep none of them.

Of each layer only its input is kept, as in gradient checkpointing (arXiv 1604.06174): the memory of
a pass is then that of one layer and of the inputs of all, at the cost of another forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from airl_fast.language_model import LanguageModel, set_adapter
from airl_fast.ops.dispatch import backend, forced_backend


def recompute_layers(model: LanguageModel) -> None:
    """Give the decoder's layers another ``forward``; names and parameters stay as they are.

    What shares the model's backbone has its layers recomputed, too.

    Raises:
        ValueError: the model does not say which of its modules are layers.
    """
    names = set(model.causal_lm._no_split_modules or ())
    layers = [module for module in model.causal_lm.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"{type(model.causal_lm).__name__} has no layer of the classes {sorted(names)}: "
            "expected _no_split_modules to name its decoder layers; set "
            "run.gradient_checkpointing=false"
        )
    for layer in layers:
        if not hasattr(layer, "recomputed"):
            layer.recomputed = True
            layer.forward = partial(_run, model.model, layer.forward)


def _run(owner: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a layer; ``owner`` is the model, or the PEFT model around it."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=partial(_contexts, owner),
        **kwargs,
    )


def _contexts(owner: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward, and around what repeats it, in whatever thread goes backward."""
    adapter = getattr(owner, "active_adapter", None)
    return nullcontext(), _as_before(owner, adapter, forced_backend.get())


@contextmanager
def _as_before(owner: Any, adapter: Any, name: str | None) -> Iterator[None]:
    """With the adapter and the forced backend of the forward pass."""
    before: Any = getattr(owner, "active_adapter", None)
    if adapter != before:
        set_adapter(owner, adapter)
    try:
        with backend(name) if name else nullcontext():
            yield
    finally:
        if adapter != before:
            set_adapter(owner, before)
