"""Which segments of a packed batch attend together, padded, in one call: the buckets.

    T tokens   P segments   n segments of a bucket, padded to l query tokens and m key tokens

A segment's queries are its own tokens, its keys those of the segment that it continues and its
own. The layout is worked out once per batch, on the CPU, and reused by every layer and by the
backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from airl_fast.packing import PackedBatch
from airl_fast.transfers import sent

_MAX_WASTE = 0.1  # of a bucket's scores may be padding ...
_FREE_SCORES = 4096  # ... or this many: another call costs more (150 us, x86 CPU core, H = 4)
_MAX_SCORES = 1 << 22  # a bucket's scores per head: bounds the masks, and the soft-capped path


@dataclass(frozen=True, eq=False)
class Bucket:
    """n segments as one padded attention call; padding repeats a segment's own last token."""

    shape: tuple[int, int, int]  # n, l, m
    query_positions: Tensor  # [n | 1, l] int64, counted in the segment's keys; 1: the same in all
    causal: bool  # no prefix: query i sees keys 0 to i, and never reaches the padding
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask, [n | 1, 1, l, m], 0 or -inf; kept for the next layer."""
        if (window, dtype) not in self.masks:
            with torch.inference_mode(False):  # training may use it after scoring has
                key = torch.arange(self.shape[2], device=self.query_positions.device)
                query = self.query_positions[:, None, :, None]
                hidden = key > query
                if window is not None:
                    hidden |= key <= query - window
                zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
                self.masks[window, dtype] = zeros.masked_fill_(hidden, -torch.inf)
        return self.masks[window, dtype]


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The buckets of a batch, and which tokens go there and come back.

    All buckets are gathered at once: the gradient of a gather costs a pass over all T tokens.
    """

    buckets: list[Bucket]
    queries: Tensor  # [sum of n * l] int64 token indices, bucket after bucket
    keys: Tensor  # [sum of n * m] int64 token indices
    restore: Tensor  # [T] int64, the row of the outputs, laid out as the queries, of each token


_layouts: "WeakKeyDictionary[PackedBatch, PackedLayout]" = WeakKeyDictionary()


def layout_of(batch: PackedBatch) -> PackedLayout:
    """Return the layout of ``batch``, made on first use and kept while the batch lives."""
    if batch not in _layouts:
        cu, prefix = segments_of(batch)
        with torch.inference_mode(False):  # training may use it after scoring has
            _layouts[batch] = _make_layout(cu, prefix, batch.device)
    return _layouts[batch]


def segments_of(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [P + 1] of the segments and what each continues [P], int64."""
    cu, prefix = (
        x.numpy().astype(np.int64) for x in (batch.on_cpu.cu_segments, batch.on_cpu.prefix)
    )
    return cu, prefix


_ranges: "WeakKeyDictionary[PackedBatch, Tensor]" = WeakKeyDictionary()


def ranges_of(batch: PackedBatch) -> Tensor:
    """Which keys the segments of ``batch`` see, [P, 5] int64 on the CPU (ops/_packed_attention)."""
    if batch not in _ranges:
        cu, prefix = segments_of(batch)
        lengths, first = np.diff(cu), cu[:-1]
        shared = np.where(prefix >= 0, lengths[prefix], 0)
        with torch.inference_mode(False):  # training may use it after scoring has
            _ranges[batch] = torch.from_numpy(
                np.stack([first, lengths, first[prefix], shared, first], 1)
            )
    return _ranges[batch]


def attend_separately(batch: PackedBatch) -> None:
    """Give every segment of ``batch`` a call of its own, before its layout is first used.

    The shapes of a call, and so the bits of its result, then depend on the segment and what it
    continues alone.
    """
    cu, prefix = segments_of(batch)
    with torch.inference_mode(False):
        _layouts[batch] = _make_layout(cu, prefix, batch.device, separate=True)


def _make_layout(
    cu: np.ndarray, prefix: np.ndarray, device: torch.device, separate: bool = False
) -> PackedLayout:
    lengths = np.diff(cu)
    before = np.where(prefix >= 0, lengths[prefix], 0)
    buckets, queries, keys = [], [], []
    restore, rows = np.empty(cu[-1], np.int64), 0
    alone = (np.array([segment]) for segment in range(lengths.size))
    for members in alone if separate else _bucket_members(lengths, before):
        own, shared = lengths[members, None], before[members, None]
        start, parent_start = cu[members, None], cu[prefix[members], None]
        query = np.minimum(np.arange(own.max()), own - 1)  # [n, l], padded with the last token
        key = np.minimum(np.arange((own + shared).max()), own + shared - 1)  # [n, m]
        keys.append(np.where(key < shared, parent_start + key, start + key - shared).ravel())
        queries.append((start + query).ravel())
        # of equal prefixes all rows count alike; otherwise padding counts as what it repeats, so
        # that it sees a key whatever the window (a row that sees none would be NaN)
        alike = bool((shared == shared[0]).all())
        positions = shared[:1] + np.arange(own.max()) if alike else shared + query
        buckets.append(
            Bucket(
                shape=(members.size, query.shape[1], key.shape[1]),
                query_positions=sent(torch.from_numpy(positions), device),
                causal=not shared.any(),
            )
        )
        real = np.arange(query.shape[1]) < own  # [n, l]
        row = rows + np.arange(query.size).reshape(query.shape)
        restore[(start + query)[real]] = row[real]
        rows += query.size
    return PackedLayout(
        buckets=buckets,
        queries=sent(torch.from_numpy(np.concatenate(queries)), device),
        keys=sent(torch.from_numpy(np.concatenate(keys)), device),
        restore=sent(torch.from_numpy(restore), device),
    )


def _bucket_members(lengths: np.ndarray, before: np.ndarray) -> Iterator[np.ndarray]:
    """Cut the segments, sorted by prefix (to within a quarter) and length, where padding grows."""
    prefix_class = np.floor(np.log(np.maximum(before, 0.5)) / np.log(1.25))
    order = np.lexsort((before, lengths, prefix_class))[::-1]
    members: list[int] = []
    real = longest = widest = 0
    for i in order.tolist():
        own, keys = int(lengths[i]), int(lengths[i] + before[i])
        padded = (len(members) + 1) * max(longest, own) * max(widest, keys)
        waste = padded - real - own * keys
        mixed = bool(members) and (before[members[0]] > 0) != (before[i] > 0)
        if members and (
            mixed or padded > _MAX_SCORES or waste > max(_MAX_WASTE * padded, _FREE_SCORES)
        ):
            yield np.array(members)
            members, real, longest, widest = [], 0, 0, 0
        members.append(i)
        real += own * keys
        longest, widest = max(longest, own), max(widest, keys)
    yield np.array(members)
