from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.packing import PackedBatch, Source, Trace, pack


def trace(prompt, completion, spans=None, **kwargs) -> Trace:
    spans = (len(completion),) if spans is None else spans
    return Trace(
        prompt=tuple(prompt), completion=tuple(completion), span_lengths=tuple(spans), **kwargs
    )


@st.composite
def traces(draw) -> Trace:
    prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))  # few: prompts repeat
    spans = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    completion = draw(st.lists(st.integers(0, 9), min_size=sum(spans), max_size=sum(spans)))
    group, source = draw(st.integers(0, 3)), draw(st.sampled_from(Source))
    return trace(prompt, completion, spans, group=group, source=source)


lists_of_traces = st.lists(traces(), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(batch=lists_of_traces, share=st.booleans())
def test_unpack_gives_the_traces_back(batch, share):
    packed = pack(batch, share_prompts=share)
    assert packed.unpack() == batch
    assert packed.num_sequences == len(batch)
    assert packed.num_actions == sum(len(t.completion) for t in batch)
    assert packed.num_spans == sum(len(t.span_lengths) for t in batch)
    prompts = {t.prompt for t in batch} if share else [t.prompt for t in batch]
    assert packed.num_tokens == packed.num_actions + sum(map(len, prompts))


@settings(max_examples=50, deadline=None)
@given(batch=lists_of_traces, share=st.booleans())
def test_states_actions_and_positions(batch, share):
    packed = pack(batch, share_prompts=share)
    sequences = [t.prompt + t.completion for t in batch]
    starts = [len(t.prompt) for t in batch]
    states = [i for s, n in zip(sequences, starts, strict=True) for i in s[n - 1 : -1]]
    actions = [i for t in batch for i in t.completion]
    positions = [i for s, n in zip(sequences, starts, strict=True) for i in range(n, len(s))]
    assert packed.input_ids[packed.state_index].tolist() == states
    assert packed.targets.tolist() == actions
    assert packed.position_ids[packed.action_index].tolist() == positions
    assert packed.position_ids[packed.state_index].tolist() == [i - 1 for i in positions]


def test_layout_of_a_shared_prompt():
    packed = pack(
        [
            trace([1, 2], [3], group=4),
            trace([5], [6, 7], (1, 1), group=8, source=Source.EXPERT),
            trace([1, 2], [8, 9], group=4, source=Source.PERTURBED),
        ]
    )
    # the shared prompt, its two completions, then the trace that shares nothing in one piece
    assert packed.input_ids.tolist() == [1, 2, 3, 8, 9, 5, 6, 7]
    assert packed.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert packed.cu_segments.tolist() == [0, 2, 3, 5, 8]
    assert packed.prefix.tolist() == [-1, 0, 0, -1]
    assert packed.state_index.tolist() == [1, 5, 6, 1, 3]
    assert packed.action_index.tolist() == [2, 6, 7, 3, 4]
    assert packed.cu_actions.tolist() == [0, 1, 3, 5]
    assert packed.cu_spans.tolist() == [0, 1, 2, 3, 5]
    assert packed.cu_seq_spans.tolist() == [0, 1, 3, 4]
    assert packed.group.tolist() == [4, 8, 4]
    assert packed.source.tolist() == [Source.POLICY, Source.EXPERT, Source.PERTURBED]
    assert packed.max_segment == 3


def test_to_moves_every_tensor():
    packed = pack([trace([1], [2, 3])])
    moved = packed.to("meta")
    assert moved.device.type == "meta"
    assert moved.cu_spans.device.type == "meta"
    assert moved.max_segment == 3
    assert packed.to("cpu") is packed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "Trace.prompt to have an entry"),
        ({"completion": ()}, "Trace.completion to have an entry"),
        ({"span_lengths": ()}, "Trace.span_lengths to have an entry"),
        ({"prompt": [1]}, "Trace.prompt to be a tuple.*received list"),
        ({"prompt": (-1,)}, "Trace.prompt to hold integers from 0 up, received -1"),
        ({"span_lengths": (2, 0)}, "Trace.span_lengths to hold integers from 1 up"),
        ({"span_lengths": (1,)}, "sum to the 2 completion tokens, received 1"),
    ],
)
def test_malformed_traces_are_refused(fields, message):
    good = {"prompt": (1,), "completion": (2, 3), "span_lengths": (1, 1)}
    with pytest.raises(ValueError, match=message):
        Trace(**good | fields)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": torch.zeros(7)}, "input_ids to be a 1-D torch.int64 tensor"),
        ({"input_ids": torch.zeros(1, 7).long()}, "input_ids to be a 1-D"),
        ({"input_ids": torch.tensor([1, 2, 3, 4, 5, 6, -7])}, "input_ids to be 0 or more.*-7 at 6"),
        ({"cu_segments": torch.tensor([0, 2, 4, 7])}, "cu_segments to be a 1-D torch.int32"),
        ({"cu_segments": _int32(0, 2, 4, 8)}, "cu_segments to rise strictly from 0 to 7"),
        ({"cu_segments": _int32(0, 4, 4, 7)}, "cu_segments to rise strictly"),
        ({"cu_segments": _int32(1, 2, 4, 7)}, "cu_segments to rise strictly"),
        ({"cu_actions": _int32(0, 3, 6)}, "cu_actions to rise strictly from 0 to 5"),
        ({"cu_spans": _int32(0, 1, 2)}, "cu_spans to rise strictly from 0 to 5"),
        ({"cu_seq_spans": _int32(0, 1, 4)}, "cu_seq_spans to rise strictly from 0 to 3"),
        ({"cu_seq_spans": _int32(0, 2, 3)}, "cu_seq_spans to be cut where cu_actions cuts"),
        ({"cu_seq_spans": _int32(0, 1, 2, 3)}, "cu_seq_spans to have 3 entries, received 4"),
        ({"position_ids": torch.arange(6)}, "position_ids to have 7 entries, received 6"),
        ({"position_ids": torch.arange(7)}, "position_ids to be counted from the prefix"),
        ({"prefix": _int32(-1, 0)}, "prefix to have 3 entries"),
        ({"prefix": _int32(-1, 0, 3)}, "prefix to be -1 or one of 3, received 3 at 2"),
        ({"prefix": _int32(-1, 0, 1)}, "prefix to be a segment that has no prefix itself"),
        ({"prefix": _int32(-1, 0, 2)}, "prefix to be a segment that has no prefix itself"),
        ({"action_index": torch.tensor([2, 3, 4, 5, 7])}, "action_index to be one of 7 tokens"),
        ({"action_index": torch.tensor([2, 3, 4, 6, 5])}, "action_index to be the token after"),
        ({"action_index": torch.tensor([0, 1, 4, 5, 6])}, "action_index to be a token with one"),
        ({"state_index": torch.tensor([1, 2, 3, 4, 5])}, "state_index to be the token before"),
        ({"state_index": torch.tensor([1, 2])}, "state_index to have 5 entries"),
        ({"group": torch.zeros(3).long()}, "group to have 2 entries, received 3"),
        ({"source": torch.tensor([0, 3])}, "source to be one of airl_fast.Source, received 3 at 1"),
        ({"max_segment": 2}, "max_segment 3, received 2"),
        ({"group": [0, 0]}, "group to be a 1-D torch.int64 tensor, received list"),
        ({"group": torch.zeros(2, device="meta").long()}, "group on cpu, received meta"),
    ],
)
def test_malformed_batches_are_refused(fields, message):
    good = pack([trace([1, 2], [3, 4]), trace([1, 2], [5, 6, 7], (1, 2))])
    assert good.prefix.tolist() == [-1, 0, 0]
    with pytest.raises(ValueError, match=message):
        replace(good, **fields)


def test_actions_of_a_sequence_may_not_cross_segments():
    good = pack([trace([1, 2], [3, 4]), trace([1, 2], [5, 6, 7])])
    with pytest.raises(ValueError, match="action_index to be the token after"):
        replace(
            good,
            cu_actions=_int32(0, 5),
            cu_seq_spans=_int32(0, 2),
            group=torch.zeros(1).long(),
            source=torch.zeros(1).long(),
        )


def test_packing_nothing_is_refused():
    with pytest.raises(ValueError, match="to be given a trace"):
        pack([])


def test_batches_hash_by_identity():
    one, two = (pack([trace([1], [2])]) for _ in range(2))
    assert isinstance(one, PackedBatch)
    assert len({one, two, one}) == 2
