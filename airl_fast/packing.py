"""Packed batches: sequences laid end to end without padding.

    T tokens   P segments   B sequences (traces)   N actions (completion tokens)   S spans

A prompt that several traces share is stored once, as a segment that their completions continue.
Whatever is per sequence, per action or per span is in the order of the traces; only the tokens
are laid out otherwise, and ``state_index`` and ``action_index`` say where each one is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import chain
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from airl_fast.batch_checks import check_batch, invalid, ranges
from airl_fast.transfers import sent


class Source(IntEnum):
    """Where a trace comes from."""

    EXPERT = 0
    POLICY = 1
    PERTURBED = 2


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One completion of one prompt, as token ids.

    Attributes:
        prompt: token ids, at least one.
        completion: token ids, at least one: the actions.
        span_lengths: actions per reward span, each at least 1, summing to ``len(completion)``.
        group: traces of equal group share a baseline.
        source: expert, policy or perturbed.

    Raises:
        ValueError: an empty prompt, completion or span, what is no integer, an unknown source, or
            spans that do not cover the completion.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    span_lengths: tuple[int, ...]
    group: int = 0
    source: Source = Source.POLICY

    def __post_init__(self) -> None:
        for name in ("prompt", "completion", "span_lengths"):
            value, least = getattr(self, name), int(name == "span_lengths")
            if not isinstance(value, tuple):
                raise invalid(
                    f"Trace.{name} to be a tuple of integers",
                    type(value).__name__,
                    f"pass tuple({name})",
                )
            if not value:
                raise invalid(f"Trace.{name} to have an entry", "none", "drop the trace")
            if set(map(type, value)) != {int}:
                strange = next((x for x in value if not isinstance(x, Integral)), None)
                if strange is not None:
                    raise invalid(
                        f"Trace.{name} to hold integers", strange, "pass one sequence of token ids"
                    )
            if min(value) < least:
                raise invalid(
                    f"Trace.{name} to hold integers from {least} up", min(value), "check its maker"
                )
        if sum(self.span_lengths) != len(self.completion):
            raise invalid(
                f"Trace.span_lengths to sum to the {len(self.completion)} completion tokens",
                sum(self.span_lengths),
                "make them with airl_fast.spans.span_rule",
            )
        if self.source not in list(Source):
            raise invalid(
                f"Trace.source of {', '.join(map(str, Source))}",
                self.source,
                "pass one of airl_fast.Source",
            )

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """A batch as flat tensors on one device, checked when built.

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64; a continuing segment's positions go on from its prefix's.
        cu_segments: [P+1] int32 offsets of the segments in the T tokens.
        prefix: [P] int32, the segment that this one continues, or -1. A prefix has none itself.
        state_index: [N] int64, the token before each action, where pi(a|s) is read.
        action_index: [N] int64, the action itself, where f is read.
        cu_actions: [B+1] int32 offsets of the sequences in the N actions.
        cu_spans: [S+1] int32 offsets of the spans in the N actions.
        cu_seq_spans: [B+1] int32 offsets of the sequences in the S spans.
        group: [B] int64.
        source: [B] int64, values of :class:`Source`.
        max_segment: tokens of the longest segment, its prefix not counted.

    Raises:
        ValueError: a field contradicts another, naming it.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_segments: Tensor
    prefix: Tensor
    state_index: Tensor
    action_index: Tensor
    cu_actions: Tensor
    cu_spans: Tensor
    cu_seq_spans: Tensor
    group: Tensor
    source: Tensor
    max_segment: int

    def __post_init__(self) -> None:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_segment"}
        check_batch(tensors, self.max_segment, list(Source))

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.numel()

    @property
    def num_actions(self) -> int:
        """N."""
        return self.action_index.numel()

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_actions.numel() - 1

    @property
    def num_spans(self) -> int:
        """S."""
        return self.cu_spans.numel() - 1

    @property
    def targets(self) -> Tensor:
        """The taken tokens, [N] int64."""
        return self.input_ids[self.action_index]

    @property
    def device(self) -> torch.device:
        """The device of every tensor."""
        return self.input_ids.device

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch on ``device`` (itself when it is already there)."""
        if self.input_ids.device == torch.empty(0, device=device).device:
            return self
        moved = object.__new__(PackedBatch)  # checked once already: do not read it back to check
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = sent(value, device)
            object.__setattr__(moved, field.name, value)
        if moved.device.type != "cpu":
            object.__setattr__(moved, "_on_cpu", self.on_cpu)
        return moved

    @property
    def on_cpu(self) -> "PackedBatch":
        """The batch in the CPU's memory: what it was made of, if it was; to look at."""
        if self.device.type == "cpu":
            return self
        kept: PackedBatch | None = getattr(self, "_on_cpu", None)
        if kept is None:
            kept = self.to("cpu")
            object.__setattr__(self, "_on_cpu", kept)
        return kept

    def unpack(self) -> list[Trace]:
        """Return the traces, in the order in which they were packed."""
        ids, cu_segments = self.input_ids.tolist(), self.cu_segments.tolist()
        prefix, actions = self.prefix.tolist(), self.action_index.tolist()
        cu_actions, cu_seq_spans = self.cu_actions.tolist(), self.cu_seq_spans.tolist()
        span_lengths = self.cu_spans.diff().tolist()
        group, source = self.group.tolist(), self.source.tolist()
        first = self.action_index[self.cu_actions[:-1].long()].cpu()
        segment = torch.searchsorted(self.cu_segments.cpu(), first, right=True).sub(1).tolist()
        traces = []
        for b, p in enumerate(segment):
            start, end = actions[cu_actions[b]], actions[cu_actions[b + 1] - 1] + 1
            shared = prefix[p]
            prompt = ids[cu_segments[p] : start]
            if shared >= 0:
                prompt = ids[cu_segments[shared] : cu_segments[shared + 1]] + prompt
            traces.append(
                Trace(
                    prompt=tuple(prompt),
                    completion=tuple(ids[start:end]),
                    span_lengths=tuple(span_lengths[cu_seq_spans[b] : cu_seq_spans[b + 1]]),
                    group=group[b],
                    source=Source(source[b]),
                )
            )
        return traces


def pack(
    traces: Sequence[Trace],
    *,
    share_prompts: bool = True,
    lone_prompts: bool = False,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay traces end to end, storing a prompt that several of them share once.

    Args:
        traces: at least one.
        share_prompts: store equal prompts once; otherwise each trace is a segment of its own.
        lone_prompts: with ``share_prompts``, give a prompt of one trace its own segment too.
        device: where the tensors go.

    Returns:
        The batch; sequences, actions and spans are in the order of ``traces``.

    Raises:
        ValueError: no traces.
    """
    if not traces:
        raise invalid("pack() to be given a trace", "none", "skip empty batches")
    check_traces(traces)
    members = by_prompt(traces) if share_prompts else [[b] for b in range(len(traces))]
    segments: list[tuple[int, ...]] = []  # token ids
    prefix: list[int] = []
    first_state, first_action = np.zeros((2, len(traces)), np.int64)
    end = 0
    for same in members:
        prompt = traces[same[0]].prompt
        shared = len(same) > 1 or (share_prompts and lone_prompts)
        if shared:
            segments.append(prompt)
            prefix.append(-1)
            end += len(prompt)
        prompt_end, parent = end, len(segments) - 1
        for b in same:
            completion = traces[b].completion
            segments.append(completion if shared else prompt + completion)
            prefix.append(parent if shared else -1)
            first_action[b] = end if shared else end + len(prompt)
            first_state[b] = (prompt_end if shared else first_action[b]) - 1
            end += len(segments[-1])
    lengths = np.array([len(segment) for segment in segments])
    parents = np.array(prefix)
    before = np.where(parents >= 0, lengths[parents], 0)  # tokens of the prefix
    cu_segments, cu_actions = _offsets(lengths), _offsets([len(t.completion) for t in traces])
    action_index = ranges(first_action, np.diff(cu_actions))
    state_index = action_index - 1
    state_index[cu_actions[:-1]] = first_state
    arrays = {
        "input_ids": np.fromiter(chain.from_iterable(segments), np.int64, cu_segments[-1]),
        "position_ids": ranges(before, lengths),
        "cu_segments": cu_segments,
        "prefix": parents.astype(np.int32),
        "state_index": state_index,
        "action_index": action_index,
        "cu_actions": cu_actions,
        "cu_spans": _offsets([n for t in traces for n in t.span_lengths]),
        "cu_seq_spans": _offsets([len(t.span_lengths) for t in traces]),
        "group": np.array([t.group for t in traces], np.int64),
        "source": np.array([t.source for t in traces], np.int64),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PackedBatch(**tensors, max_segment=int(lengths.max())).to(device)


def check_traces(traces: Sequence[Trace]) -> None:
    """Refuse what is no trace, naming its index.

    Raises:
        TypeError: it is something else.
    """
    for i, trace in enumerate(traces):
        if not isinstance(trace, Trace):
            raise TypeError(
                f"expected traces, received {type(trace).__name__} at index {i}: make each with "
                "airl_fast.Trace"
            )


def by_prompt(traces: Sequence[Trace]) -> list[list[int]]:
    """Indices of the traces of each distinct prompt, in order of first appearance."""
    members: dict[tuple[int, ...], list[int]] = {}
    for b, trace in enumerate(traces):
        members.setdefault(trace.prompt, []).append(b)
    return list(members.values())


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """CSR offsets, int32 [n+1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise invalid("fewer than 2**31 tokens in a batch", offsets[-1], "use micro-batches")
    return offsets.astype(np.int32)
