"""A transformers decoder's layers on the fused products of a CPU, with the same parameters.

    T tokens   D hidden size   H query heads   E head size

``fuse`` gives single modules another ``forward``: names, parameters and hooks stay as they are, and
what the products cannot serve (another device, another dtype, few tokens) runs as it did.

Without gradients whole layers of Llama (SmolLM2 is one), Mistral, Qwen2 and Qwen3 run in four
products: the norm is applied to what a product reads, silu and gate, biases and the residual to
what it writes. In its first pass a layer is held to its own forward, and where another version of
transformers has changed that, it stays what it was.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from airl_fast.attention import packed_attention
from airl_fast.ops import _cpu_products as products
from airl_fast.ops._cpu_products import Factor, Norm

_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
# Error over the largest magnitude, by the precision of products, beyond which a layer is another.
_TOLERANCE = {"highest": 1e-4, "high": 1e-3, "medium": 1e-1}
_log = logging.getLogger(__name__)


def fuse(model: nn.Module) -> None:
    """Let a decoder's linear layers, and whole layers where they are known, use the products."""
    for module in model.modules():
        kind = type(module)
        if isinstance(module, nn.Linear) and kind is nn.Linear:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        elif kind.__name__ in _KNOWN and kind.__module__.startswith("transformers."):
            module.forward = partial(_layer, module, _Trust())


class _Trust:
    """Whether a layer has been found to compute what the fused one does."""

    found: bool | None = None


def _linear(module: nn.Linear, input: Tensor) -> Tensor:
    return products.linear(input, module.weight, module.bias)


def _layer(layer: Any, trust: _Trust, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a decoder layer."""
    own = partial(type(layer).forward, layer, hidden_states, *args, **kwargs)
    if args or trust.found is False or not _serves(layer, hidden_states, kwargs):
        return own()
    result = _run(layer, hidden_states[0], kwargs)[None]
    if trust.found is None:
        expected = own()
        trust.found = isinstance(expected, Tensor) and _alike(result, expected)
        if not trust.found:
            _log.info("%s runs as transformers has it, not fused", type(layer).__name__)
            return expected
    return result


def _serves(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether one pass can run fused: one of ours, without gradients, in float32, long enough."""
    if kwargs.get("packed_batch") is None or kwargs.get("position_embeddings") is None:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    weights = [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip
    if any(type(module) is not nn.Linear for module in weights) or torch.is_grad_enabled():
        return False  # with an adapter, or to be differentiated
    if torch.is_autocast_enabled("cpu") or hidden_states.dtype != torch.float32:
        return False
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    if attention.o_proj.bias is not None or any(m.bias is not None for m in weights[4:]):
        return False
    cos, _ = kwargs["position_embeddings"]
    rows = hidden_states[0]
    return (
        cos.dtype == torch.float32
        and cos.shape == (1, len(rows), attention.head_dim)
        and rows.is_contiguous()
        and all(
            module.weight.dtype == torch.float32
            and products.serves_rows(len(rows), module.weight) is None
            for module in weights
        )
    )


def _run(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A layer's output [T, D] from its input [T, D]."""
    y = _attend(layer, x, kwargs)
    mlp, norm = layer.mlp, _norm(layer.post_attention_layernorm)
    gated = x.new_empty(len(x), mlp.gate_proj.out_features)
    gate, up = mlp.gate_proj.weight.t(), mlp.up_proj.weight.t()
    if not products.multiply_gated(y, Factor(gate, gated), up, norm):
        wide = torch.empty_like(gated)
        products.multiply_all(y, [Factor(gate, gated), Factor(up, wide)], norm=norm)
        nn.functional.silu(gated, inplace=True).mul_(wide)
    z = torch.empty_like(y)
    products.multiply_all(gated, [Factor(mlp.down_proj.weight.t(), z, plus=y)])
    return z


def _attend(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Input and attention's output added up, [T, D]."""
    attention = layer.self_attn
    heads = []
    factors = []
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        out = x.new_empty(len(x), linear.out_features)
        factors.append(Factor(linear.weight.t(), out, plus=linear.bias))
        heads.append(out.unflatten(1, (-1, attention.head_dim)))
    products.multiply_all(x, factors, norm=_norm(layer.input_layernorm))
    q, k, v = heads
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (part[0].contiguous() for part in kwargs["position_embeddings"])
    products.rotate(q, cos, sin)
    products.rotate(k, cos, sin)
    query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
    attended, _ = packed_attention(
        attention,
        query,
        key,
        value,
        kwargs.get("attention_mask"),
        scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", None),
        packed_batch=kwargs["packed_batch"],
    )
    y = torch.empty_like(x)
    rows = attended[0].flatten(1).contiguous()
    products.multiply_all(rows, [Factor(attention.o_proj.weight.t(), y, plus=x)])
    return y


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _alike(found: Tensor, expected: Tensor) -> bool:
    error = (found - expected).abs().max()
    limit = _TOLERANCE[torch.get_float32_matmul_precision()] * expected.abs().max()
    return bool(error <= limit)
