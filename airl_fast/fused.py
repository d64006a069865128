"""A transformers decoder's layers on fused operators, with the same parameters.

    T tokens   D hidden size   H query heads   E head size

``fuse`` gives modules another ``forward``: names and parameters stay as they are, and what the
operators cannot serve (another dtype, a cache) runs as it did.

Whole layers of Llama (SmolLM2 is one), Mistral, Qwen2 and Qwen3 run on operators that read and
write once: norm, rotation, silu and gate; on a CPU in float32, on a GPU in half precision too. On a
CPU without gradients and adapters, on a processor that has them, they are part of four products:
the norm of what a product reads; silu and gate, biases and the residual of what it writes. In its
first pass a layer is held to its own forward, and where another version of transformers has changed
that, it stays what it was.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from airl_fast.attention import packed_attention
from airl_fast.ops import _cpu_products as products
from airl_fast.ops import _layer as between
from airl_fast.ops._cpu_products import Factor, Norm

_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
# A token's error over its norm, by the precision of products, beyond which a layer is another.
_TOLERANCE = {"highest": 1e-4, "high": 1e-3, "medium": 1e-1}
_BATCHES = ("packed_batch", "rows")  # what a pass may run on
_log = logging.getLogger(__name__)


def fuse(model: nn.Module) -> None:
    """Let a decoder's linear layers, and whole layers where they are known, use the operators."""
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
    if trust.found is None:
        if kwargs.get("rows") is not None:  # which take a token once
            return own()
        with torch.no_grad():
            # what goes by is kept once, by the pass that counts
            found = _run(layer, hidden_states[0], {**kwargs, "keep": None})
            expected = own(keep=None)
            trust.found = _alike(found[None], expected)
        if not trust.found:
            _log.info("%s runs as transformers has it, not fused", type(layer).__name__)
            return own()
    return _run(layer, hidden_states[0], kwargs)[None]


def _alike(found: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    share = _TOLERANCE[torch.get_float32_matmul_precision()]
    if expected.dtype != torch.float32:
        share = 4 * torch.finfo(expected.dtype).eps
    # each token by itself: in real models some are a thousand times as large as the others
    error, size = ((x.float()).norm(dim=-1) for x in (found - expected, expected))
    return bool((error <= share * size).all())


def _serves(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a pass can run fused: one of ours, and nobody listens inside."""
    if all(kwargs.get(name) is None for name in _BATCHES):
        return False  # a text alone keeps its keys: once
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return False
    if kwargs.get("position_embeddings") is None:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    cos, sin = kwargs["position_embeddings"]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        not torch.is_autocast_enabled(hidden_states.device.type)
        and between.serves(hidden_states, cos, sin, *(norm.weight for norm in norms))
        and cos.shape == (1, hidden_states.shape[1], attention.head_dim)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and not any(_heard(module) for module in (attention, mlp, *norms))
    )


def _heard(module: nn.Module) -> bool:
    """Whether somebody's hooks wait for a module's call; transformers' own record on request."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not hook.__module__.startswith("transformers.") for hook in hooks)


def _run(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A layer's output [T, D] from its input [T, D]."""
    if _fits_products(layer, x):
        return _in_products(layer, x.contiguous(), kwargs)
    attention, mlp = layer.self_attn, layer.mlp
    normed = _normed(layer.input_layernorm, x)
    heads = [m(normed) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    x = x + attention.o_proj(_attended(attention, heads, kwargs))
    normed = _normed(layer.post_attention_layernorm, x)
    down: Tensor = mlp.down_proj(between.gated(mlp.gate_proj(normed), mlp.up_proj(normed)))
    return x + down


def _normed(norm: Any, x: Tensor) -> Tensor:
    return between.rms_norm(x, norm.weight, norm.variance_epsilon)


def _attended(attention: Any, projected: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    """What every token takes from those it sees, [T, H * E], from projections [T, heads * E]."""
    q, k, v = (part.unflatten(1, (-1, attention.head_dim)) for part in projected)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (part[0] for part in kwargs["position_embeddings"])
    q, k = between.rotated(q, cos, sin), between.rotated(k, cos, sin)
    query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
    passed: dict[str, Any] = {name: kwargs.get(name) for name in (*_BATCHES, "keep")}
    out, _ = packed_attention(
        attention,
        query,
        key,
        value,
        kwargs.get("attention_mask"),
        scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", None),
        **passed,
    )
    return out[0].flatten(1)


def _fits_products(layer: Any, x: Tensor) -> bool:
    """Whether a layer can be four products: plain weights, no gradients, tiles that serve."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = attention.q_proj, attention.k_proj, attention.v_proj
    others = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and all(
            type(module) is nn.Linear
            and not _heard(module)
            and module.weight.dtype == torch.float32
            and (module.bias is None or module in heads)
            and products.fits_bias(module.bias, module.out_features)
            and products.serves_rows(len(x), module.weight) is None
            for module in (*heads, *others)
        )
    )


def _in_products(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    projected, factors = [], []
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        projected.append(x.new_empty(len(x), linear.out_features))
        factors.append(Factor(linear.weight.t(), projected[-1], plus=linear.bias))
    products.multiply_all(x, factors, norm=_norm(layer.input_layernorm))
    attended = _attended(attention, projected, kwargs).contiguous()
    y = torch.empty_like(x)
    products.multiply_all(attended, [Factor(attention.o_proj.weight.t(), y, plus=x)])

    norm, gate, up = _norm(layer.post_attention_layernorm), mlp.gate_proj.weight.t(), mlp.up_proj
    middle = x.new_empty(len(x), mlp.gate_proj.out_features)
    if not products.multiply_gated(y, Factor(gate, middle), up.weight.t(), norm):
        wide = torch.empty_like(middle)
        both = [Factor(gate, middle), Factor(up.weight.t(), wide)]
        products.multiply_all(y, both, norm=norm)
        middle = between.gated(middle, wide)
    z = torch.empty_like(y)
    products.multiply_all(middle, [Factor(mlp.down_proj.weight.t(), z, plus=y)])
    return z


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
