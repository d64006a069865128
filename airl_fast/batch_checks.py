"""What must hold between the fields of a PackedBatch, and the wording of errors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from airl_fast.packing import PackedBatch

_INT32 = ("cu_segments", "prefix", "cu_actions", "cu_spans", "cu_seq_spans")
_USE_PACK = "build batches with airl_fast.pack()"


def check_batch(tensors: dict[str, Tensor], max_segment: int, sources: Sequence[int]) -> None:
    """Raise ValueError unless the fields of a PackedBatch fit each other.

    Args:
        tensors: every field that is a tensor, by name.
        max_segment: the field of that name.
        sources: what ``source`` may hold.

    Raises:
        ValueError: naming the first field that is wrong, and its first wrong entry.
    """
    arrays: dict[str, np.ndarray] = {}
    device = tensors["input_ids"].device if isinstance(tensors["input_ids"], Tensor) else None
    for name, value in tensors.items():
        dtype = torch.int32 if name in _INT32 else torch.int64
        if not isinstance(value, Tensor) or value.ndim != 1 or value.dtype != dtype:
            got = (
                f"{value.dtype} {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise invalid(f"PackedBatch.{name} to be a 1-D {dtype} tensor", got, _USE_PACK)
        if value.device != device:
            raise invalid(f"PackedBatch.{name} on {device}", value.device, "move it")
        arrays[name] = value.cpu().numpy()
    for offsets, end in (
        ("cu_segments", arrays["input_ids"].size),
        ("cu_actions", arrays["action_index"].size),
        ("cu_spans", arrays["action_index"].size),
        ("cu_seq_spans", arrays["cu_spans"].size - 1),
    ):
        cu = arrays[offsets]
        if cu.size < 2 or cu[0] != 0 or cu[-1] != end or (np.diff(cu) < 1).any():
            raise invalid(f"PackedBatch.{offsets} to rise strictly from 0 to {end}", cu, _USE_PACK)
    _check_sizes(arrays)
    _check_segments(arrays, max_segment)
    _check_actions(arrays)
    _check(arrays, "source", np.isin(arrays["source"], sources), "one of airl_fast.Source")


def _check_sizes(a: dict[str, np.ndarray]) -> None:
    num_sequences = a["cu_actions"].size - 1
    for name, size in (
        ("position_ids", a["input_ids"].size),
        ("prefix", a["cu_segments"].size - 1),
        ("state_index", a["action_index"].size),
        ("cu_seq_spans", num_sequences + 1),
        ("group", num_sequences),
        ("source", num_sequences),
    ):
        if a[name].size != size:
            raise invalid(f"PackedBatch.{name} to have {size} entries", a[name].size, _USE_PACK)


def _check_segments(a: dict[str, np.ndarray], max_segment: int) -> None:
    lengths, prefix = np.diff(a["cu_segments"]), a["prefix"]
    _check(a, "input_ids", a["input_ids"] >= 0, "0 or more")
    _check(a, "prefix", (prefix >= -1) & (prefix < prefix.size), f"-1 or one of {prefix.size}")
    depth_one = (prefix < 0) | (prefix[prefix] == -1)
    _check(a, "prefix", depth_one, "a segment that has no prefix itself")
    positions = ranges(np.where(prefix >= 0, lengths[prefix], 0), lengths)
    _check(a, "position_ids", a["position_ids"] == positions, "counted from the prefix's start")
    if max_segment != lengths.max():
        raise invalid(f"PackedBatch.max_segment {lengths.max()}", max_segment, _USE_PACK)


def _check_actions(a: dict[str, np.ndarray]) -> None:
    cu_segments, prefix, action = a["cu_segments"], a["prefix"], a["action_index"]
    inside = (action >= 0) & (action < a["input_ids"].size)
    _check(a, "action_index", inside, f"one of {a['input_ids'].size} tokens")
    segment = np.searchsorted(cu_segments, action, side="right") - 1
    starts = np.isin(np.arange(action.size), a["cu_actions"])  # first action of a sequence
    follows = starts | ((np.diff(action, prepend=-1) == 1) & (np.diff(segment, prepend=-1) == 0))
    _check(a, "action_index", follows, "the token after the action before it")
    parent = prefix[segment]
    prompt_end = np.where(parent >= 0, cu_segments[parent + 1] - 1, -1)
    state = np.where(action > cu_segments[segment], action - 1, prompt_end)
    _check(a, "action_index", state >= 0, "a token with one before it")
    _check(a, "state_index", a["state_index"] == state, "the token before the action")
    span_bounds = a["cu_spans"][np.minimum(a["cu_seq_spans"], a["cu_spans"].size - 1)]
    _check(a, "cu_seq_spans", span_bounds == a["cu_actions"], "cut where cu_actions cuts")


def _check(a: dict[str, np.ndarray], name: str, ok: np.ndarray, expected: str) -> None:
    """Raise ValueError at the first entry of ``a[name]`` that is not ``ok``."""
    if not ok.all():
        i = int(np.argmin(ok))
        raise invalid(
            f"every entry of PackedBatch.{name} to be {expected}", f"{a[name][i]} at {i}", _USE_PACK
        )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` of each length, end to end, int64."""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)


def invalid(expected: str, received: object, remedy: str) -> ValueError:
    """Word an error the way of this house."""
    return ValueError(f"expected {expected}, received {received}: {remedy}")


def check_tokens(trunk: nn.Module, batch: "PackedBatch", embedded: bool) -> int:
    """Refuse a batch on another device, and token ids that the embeddings have no row for.

    Returns:
        The tokens of the longest sequence.
    """
    embeddings: Tensor = trunk.get_input_embeddings().weight  # type: ignore[operator]
    if batch.device != embeddings.device:
        raise ValueError(
            f"the batch is on {batch.device} and the model on {embeddings.device}: move it with "
            f"batch.to({str(embeddings.device)!r})"
        )
    largest, last = int(batch.on_cpu.input_ids.max()), int(batch.on_cpu.position_ids.max())
    if embedded and largest >= len(embeddings):
        raise ValueError(
            f"expected token ids below {len(embeddings)}, the rows of the model's embeddings, "
            f"received {largest}: encode with the model's own tokenizer"
        )
    return last + 1


def rope_limit(config: Any) -> tuple[float, str]:
    """Tokens beyond which the rotation depends on the longest of a batch, and which type does."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer = [p for p in parameters.values() if isinstance(p, dict)]
    limits = [
        (rope.get("original_max_position_embeddings") or config.max_position_embeddings, kind)
        for rope in per_layer or [parameters]
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope")
    ]
    return min(limits, default=(float("inf"), ""))


def check_rope(config: Any, longest: int) -> None:
    """Refuse lengths at which the rotation depends on the longest sequence of the batch."""
    limit, kind = rope_limit(config)
    if longest > limit:
        raise ValueError(
            f"a sequence has {longest} tokens, and beyond {limit} the model's {kind!r} rotary "
            "embedding would change with the other sequences of the batch: keep sequences within "
            "that, or use another model"
        )
