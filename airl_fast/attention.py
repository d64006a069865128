"""Exact variable-length attention for transformers decoders that are given a packed batch.

    T tokens   H query heads   Hk key heads   E head size

A segment attends to itself, causally, and to all of the segment that it continues, so that every
sequence gets exactly the result of being run alone. On a GPU that is one call of flash attention
(varlen.py) where it can serve, on a CPU one of a kernel of its own (ops/_packed_attention.py);
everywhere else torch's attention takes segments of like size at once (buckets.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from airl_fast import varlen
from airl_fast.batch_checks import check_rope, check_tokens
from airl_fast.buckets import Scoring, attend, attend_in_buckets
from airl_fast.layout import ranges_of
from airl_fast.ops import _packed_attention
from airl_fast.packing import PackedBatch

if TYPE_CHECKING:
    from airl_fast.continuing import Pass
    from airl_fast.decoding import Rows

NAME = "airl_fast"  # of the attention implementation registered with transformers
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_REFUSED = ("position_bias", "indices", "block_indices")  # keywords that change the scores


class Kept:
    """Keys [1, Hk, T, E] and values of a packed pass, in the order of the calls of attention."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_batch: PackedBatch | None = None,
    keep: Kept | None = None,
    alone: "Pass | None" = None,
    rows: "Rows | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within the sequences of a packed batch (transformers' AttentionInterface).

    Args:
        module: the attention layer.
        query: [1, H, T, E].
        key: [1, Hk, T, E]; H is a multiple of Hk.
        value: [1, Hk, T, Ev].
        attention_mask: the layer's window as :func:`_no_mask` gives it, or None.
        scaling: of the scores; None is 1 / sqrt(E).
        dropout: must be 0.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it.
        softcap: as in :class:`Scoring`.
        s_aux: as in :class:`Scoring`.
        packed_batch: the batch, as :func:`packed_forward` passes it.
        keep: of a batch, where keys and values are put.
        alone: one text instead of a batch (continuing.py).
        rows: a token of each of these instead of a batch (decoding.py).
        kwargs: whatever else the model passes on; what would change the scores is refused.

    Returns:
        [1, T, H, Ev], and None for the attention weights.

    Raises:
        ValueError: no batch, dropout, or an argument that this attention does not know.
    """
    name = type(module).__name__
    if packed_batch is None and alone is None and rows is None:
        raise ValueError(
            f"{name} is set up for packed batches but was given none: call the model through "
            "airl_fast.attention.packed_forward, or inside standard_attention(model) to generate"
        )
    _refuse_what_is_not_honoured(module, dropout, kwargs)
    window = _agreed_window(name, attention_mask, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, window, softcap, s_aux)
    if alone is not None:
        key, value = alone.extend(key, value)
        if _in_one_call(query, key, value, scoring, *alone.bucket.shape[1:]):
            return _in_ranges(alone.ranges, query, key, value, scoring), None
        out = attend(alone.bucket, query, key, value, scoring)
        return out.transpose(1, 2), None
    if rows is not None:
        return rows.attend(query, key, value, scoring), None
    if keep is not None:
        keep.calls.append((key, value))
    assert packed_batch is not None
    if varlen.serves(query, value, softcap, s_aux) is None:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        layout = varlen.varlen_layout_of(packed_batch)
        return varlen.varlen_attention(layout, q, k, v, scale, window)[None], None
    tokens = packed_batch.num_tokens
    if _in_one_call(query, key, value, scoring, tokens, tokens):
        return _in_ranges(ranges_of(packed_batch), query, key, value, scoring), None
    return attend_in_buckets(packed_batch, query, key, value, scoring), None


def _refuse_what_is_not_honoured(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"{name} has an attention dropout of {dropout}, which packed attention does not apply: "
            "set it to 0 in the model's configuration (attention_dropout, attn_pdrop)"
        )
    refused = [k for k in _REFUSED if kwargs.get(k) is not None]
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        refused.append("is_causal=False")
    if refused:
        raise ValueError(
            f"{name} passes {', '.join(refused)}, which packed attention cannot honour: "
            "use another model"
        )


def _in_one_call(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, queries: int, keys: int
) -> bool:
    """Whether the CPU's kernel takes a pass of so many tokens."""
    scale, window, softcap, s_aux = scoring
    plain = softcap is None and s_aux is None
    return plain and _packed_attention.serves(query, key, value, scale, window, queries, keys)


def _in_ranges(
    ranges: Tensor, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of all segments in one call of the CPU's kernel, [1, T, H, Ev]."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return _packed_attention.attend(ranges, q, k, v, scoring.scale, scoring.window)[None]


def _agreed_window(name: str, attention_mask: Tensor | None, given: int | None) -> int | None:
    """Return the window of a layer: the mask's, which ``given`` (the layer's) must not contradict.

    transformers reads the window from the mask, except in flash attention, so that some models
    (Qwen2-MoE) do not pass it to the attention function.
    """
    if attention_mask is not None and attention_mask.ndim:
        raise ValueError(
            f"{name} was given an attention mask of shape {tuple(attention_mask.shape)}: packed "
            "batches take none; call the model through airl_fast.attention.packed_forward"
        )
    window = None if attention_mask is None else int(attention_mask)
    if given is not None and given != window:
        raise ValueError(
            f"{name} asks for a sliding window of {given}, its mask for {window}: packed attention "
            "cannot tell which holds; use another model"
        )
    return window


def _no_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """Build no mask (transformers' AttentionMaskInterface): return the window, if any, as 0-d."""
    if kwargs.get("use_vmap") or "allow_is_bidirectional_skip" in kwargs:
        raise ValueError(
            "the model changes the causal mask (bidirectional or blockwise attention), which "
            "packed attention cannot honour: use a causal text decoder"
        )
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def enable_packed_attention(model: nn.Module) -> None:
    """Make a transformers decoder (or a PEFT model around one) attend by packed sequences.

    The model then runs through :func:`packed_forward`, and generates inside
    :func:`standard_attention`.

    Raises:
        ValueError: the model mixes tokens otherwise than by causal attention, or does not use
            transformers' attention interface.
    """
    base = _transformers_model(model)
    reason = _why_not(base)
    if reason is not None:
        raise ValueError(
            f"{type(base).__name__} cannot take packed batches: {reason}; use a causal decoder "
            "whose layers are all full or sliding-window attention"
        )
    base.set_attn_implementation(NAME)
    if base.config.get_text_config()._attn_implementation != NAME:
        raise ValueError(f"{type(base).__name__} does not let its attention be replaced")


def _why_not(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        return f"it has layers of type {', '.join(others)}"
    if getattr(model, "_is_stateful", False) or any(
        isinstance(m, nn.Conv1d) for m in model.modules()
    ):
        return "it carries a recurrent or convolutional state from token to token"
    if any(getattr(m, "is_causal", True) is False for m in model.modules()):
        return "its attention is not causal"
    if not model._supports_attention_backend:
        return "it does not use transformers' attention interface"
    return None


@contextmanager
def standard_attention(model: nn.Module) -> Iterator[None]:
    """Put a model back on transformers' own attention inside the ``with`` block, to generate.

    That is ``"sdpa"``, or ``"eager"`` where the model needs it: transformers 5.17 lets Gemma 2 run
    on sdpa, which leaves its soft-capping out.
    """
    base = _transformers_model(model)
    before = base.config._attn_implementation
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None
    base.set_attn_implementation("sdpa" if base._supports_sdpa and not capped else "eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def packed_forward(
    trunk: nn.Module,
    batch: PackedBatch,
    *,
    inputs_embeds: Tensor | None = None,
    keep: Kept | None = None,
) -> Tensor:
    """Run a decoder's trunk on a packed batch.

    Args:
        trunk: the model below the head (``LlamaModel``), after :func:`enable_packed_attention`.
        batch: on the trunk's device.
        inputs_embeds: [T, D], instead of the embeddings of ``batch.input_ids``.
        keep: takes the keys and values of every attention layer.

    Returns:
        The last hidden states, after the final norm, [T, D]: those of each sequence run alone.

    Raises:
        ValueError: the trunk is not enabled, has a head, or rotates by the longest sequence; the
            embeddings are not one per token.
    """
    if not isinstance(batch, PackedBatch):
        raise TypeError(
            f"expected a PackedBatch, received {type(batch).__name__}: make one with "
            "airl_fast.pack()"
        )
    config = enabled(trunk)
    longest = check_tokens(trunk, batch, inputs_embeds is None)
    if inputs_embeds is not None and inputs_embeds.shape[:-1] != (batch.num_tokens,):
        raise ValueError(
            f"expected inputs_embeds of shape [{batch.num_tokens}, D], received "
            f"{tuple(inputs_embeds.shape)}: one row per token of the batch"
        )
    check_rope(config, longest)
    tokens = (
        {"input_ids": batch.input_ids[None]}
        if inputs_embeds is None
        else {"inputs_embeds": inputs_embeds[None]}
    )
    output = trunk(
        **tokens,
        position_ids=batch.position_ids[None],
        attention_mask=unmasked(batch.num_tokens, batch.device),
        use_cache=False,
        packed_batch=batch,
        keep=keep,
    )
    return last_hidden(trunk, output)


def enabled(trunk: nn.Module) -> Any:
    """The text configuration of a trunk that attends by packed sequences; others are refused."""
    config = _transformers_model(trunk).config.get_text_config()
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(trunk).__name__} attends by {config._attn_implementation!r}, which would let "
            "packed sequences see each other: call enable_packed_attention(model) first"
        )
    return config


def unmasked(tokens: int, device: torch.device) -> Tensor:
    """A mask [1, T] that hides nothing, and is not read.

    Without one transformers looks, on a GPU waits, whether positions are those of packed sequences.
    """
    return torch.ones(1, tokens, dtype=torch.bool, device=device)


def last_hidden(trunk: nn.Module, output: Any) -> Tensor:
    """The states [T, D] that a trunk returned for a batch of one."""
    if not hasattr(output, "last_hidden_state"):
        raise ValueError(
            f"{type(trunk).__name__} returns no last_hidden_state: pass the trunk below its head, "
            "model.get_decoder()"
        )
    return output.last_hidden_state[0]


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    unwrap = getattr(model, "get_base_model", None)  # PEFT
    base = model if unwrap is None else unwrap()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"expected a transformers model (or a PEFT model around one), received "
            f"{type(base).__name__}"
        )
    return base
