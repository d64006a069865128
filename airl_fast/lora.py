"""LoRA layers of PEFT that add their low-rank product in one pass, in the backbone's precision.

    x W^T + (s x A^T) B^T        A [R, K]   B [N, R]   s: alpha / R

(Hu et al. 2021, arXiv 2106.09685). PEFT forms the low-rank product, scales it and adds it: three
passes over [T, N], in float32 beside a bfloat16 backbone whose states it converts. Here the scale
is on the [T, R] side, one ``addmm_`` does the rest, and A and B, which stay float32 as parameters,
are rounded to the states' dtype for the products, as automatic mixed precision does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def fuse_adapters(model: nn.Module) -> None:
    """Let the plain LoRA layers of a model add their product in one pass; others stay PEFT's."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer":
            module.forward = partial(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _plain(layer)
    if name is None or torch.is_autocast_enabled(x.device.type):
        own: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return own
    base = layer.base_layer(x)
    down, up = (part[name].weight.to(x.dtype) for part in (layer.lora_A, layer.lora_B))
    low = linear(x, down) * layer.scaling[name]
    base.view(-1, base.shape[-1]).addmm_(low.flatten(0, -2), up.t())  # no copy of the product
    return base


def _plain(layer: Any) -> str | None:
    """The one adapter of a layer that adds no more than a low-rank product; None for any other."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    plain = (
        name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )
    return name if plain else None
