"""Token advantages against a plain loop over Python lists, written apart from the code."""

from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast import group_advantages
from airl_fast.advantages import token_advantages

EVERY = [
    {"baseline": baseline, "scale": scale, "level": level}
    for baseline in ("mean", "leave_one_out", "none")
    for scale in ("std", "none")
    for level in ("sequence", "span")
]


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_hand(rewards, span_lengths, group, *, gamma, baseline, scale, level) -> list[float]:
    """rewards: one list per sequence; span_lengths: their tokens, likewise."""
    returns = []
    for sequence in rewards:
        to_go = [
            sum(gamma ** (j - i) * sequence[j] for j in range(i, len(sequence)))
            for i in range(len(sequence))
        ]
        returns.append(to_go)

    tokens = []
    for b, mine in enumerate(returns):
        others = [r for i, r in enumerate(returns) if group[i] == group[b] and i != b]
        members = [*others, mine]
        if level == "sequence":
            deviation = pstdev(r[0] for r in members)
        else:
            deviation = pstdev(value for r in members for value in r)
        for k, value in enumerate(mine):
            at = 0 if level == "sequence" else k
            compared = {"mean": members, "leave_one_out": others, "none": []}[baseline]
            column = [r[at] if at < len(r) else 0.0 for r in compared]
            advantage = value - (fmean(column) if column else 0.0)
            if scale == "std":
                advantage /= deviation + 1e-6
            tokens += [advantage] * span_lengths[b][k]
    return tokens


@st.composite
def batches(draw):
    """Sequences of several lengths in groups of at least two, in a scattered order."""
    group = draw(st.lists(st.sampled_from([3, -1, 2**40]), min_size=1, max_size=4))
    group = draw(st.permutations(group * 2))
    lengths = [draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)) for _ in group]
    seed = draw(st.integers(0, 1000))
    flat = torch.randn(sum(map(len, lengths)), generator=torch.Generator().manual_seed(seed))
    rewards = [piece.tolist() for piece in flat.split([len(x) for x in lengths])]
    return rewards, lengths, group


def call(rewards, span_lengths, group, **options) -> torch.Tensor:
    return token_advantages(
        torch.tensor([r for sequence in rewards for r in sequence]),
        cu_spans=offsets(n for sequence in span_lengths for n in sequence),
        cu_seq_spans=offsets(len(sequence) for sequence in rewards),
        group=torch.tensor(group),
        **options,
    )


@pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(o.values()))
@settings(max_examples=15, deadline=None)
@given(batch=batches(), gamma=st.sampled_from([0.0, 0.9, 1.0]))
def test_equals_a_plain_loop(options, batch, gamma):
    got = call(*batch, gamma=gamma, **options)
    expected = torch.tensor(by_hand(*batch, gamma=gamma, **options))
    assert got.dtype == torch.float32
    # Two returns of a group can nearly coincide, and their rounding is then divided by a small std.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_one_span_per_sequence_is_group_advantages(baseline, scale):
    rewards, group = torch.randn(6), torch.tensor([1, 0, 1, 0, 1, 1])
    spans = offsets([2, 3, 1, 1, 4, 2])
    expected = group_advantages(rewards, group, baseline=baseline, scale=scale)
    for level in ("sequence", "span"):
        got = token_advantages(
            rewards,
            cu_spans=spans,
            cu_seq_spans=offsets([1] * 6),
            group=group,
            baseline=baseline,
            scale=scale,
            level=level,
        )
        torch.testing.assert_close(got, expected.repeat_interleave(spans.diff()))


def test_an_ended_member_counts_as_zero_to_go():
    """Two spans against one: the second span's baseline is half its own return."""
    got = call([[1.0, 4.0], [2.0]], [[1, 1], [1]], [0, 0], scale="none", level="span")
    assert got.tolist() == [5 - 3.5, 4 - 2, 2 - 3.5]


def test_the_span_baseline_is_unbiased_in_total():
    """With the group's mean, the advantages of each column sum to what ended members leave."""
    rewards = [[1.0, 2.0], [0.5, -1.0], [3.0, 0.25]]
    got = call(rewards, [[1, 1]] * 3, [0] * 3, scale="none", level="span").view(3, 2)
    torch.testing.assert_close(got.sum(0), torch.zeros(2))


def test_defaults_are_those_of_group_advantages_without_discount():
    rewards, lengths, group = [[1.0, 2.0], [0.5]], [[1, 2], [3]], [0, 0]
    expected = call(
        rewards, lengths, group, gamma=1.0, baseline="mean", scale="std", level="sequence"
    )
    assert torch.equal(call(rewards, lengths, group), expected)


def test_a_group_of_one_has_no_advantage_over_itself():
    got = call([[1.0, 2.0]], [[1, 2]], [0], level="span")
    assert torch.equal(got, torch.zeros(3))


def test_empty_batch_and_no_gradient():
    none = torch.zeros(0)
    got = token_advantages(
        none, cu_spans=offsets([]), cu_seq_spans=offsets([]), group=none.long(), level="span"
    )
    assert got.shape == (0,)
    rewards = torch.randn(2, requires_grad=True)
    got = token_advantages(
        rewards, cu_spans=offsets([1, 2]), cu_seq_spans=offsets([1, 1]), group=torch.zeros(2).long()
    )
    assert not got.requires_grad


def test_long_sequences_and_large_rewards():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.randn(2, 5000, generator=generator) * 1e4).tolist()
    got = call(rewards, [[1] * 5000] * 2, [0, 0], gamma=0.9, scale="none", level="span")
    assert got.isfinite().all()
    first, second = got.view(2, 5000)
    torch.testing.assert_close(first, -second, rtol=1e-5, atol=1e-2)


GOOD = {
    "rewards": torch.ones(3),
    "cu_spans": offsets([2, 1, 1]),
    "cu_seq_spans": offsets([2, 1]),
    "group": torch.tensor([0, 0]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "median"}, "baseline to be one of"),
        ({"scale": "mad"}, "scale to be one of"),
        ({"level": "token"}, "level to be one of 'sequence', 'span', received 'token'"),
        ({"gamma": 2.0}, "gamma in \\[0, 1\\]"),
        ({"group": torch.tensor([0])}, "2 int64 labels"),
        ({"group": torch.tensor([8, 9]), "baseline": "leave_one_out"}, "group 8 has one member"),
        ({"cu_spans": offsets([2, 1])}, "cu_spans of 4 offsets for 3 rewards, received 3"),
        ({"cu_spans": offsets([2, 0, 1])}, "span 1 of cu_spans is empty"),
        ({"cu_seq_spans": offsets([2, 2])}, "from 0 to 3"),
        ({"cu_seq_spans": offsets([3, 0])}, "span 1 of cu is empty"),
        ({"rewards": torch.tensor([1.0, torch.nan, 0])}, "finite rewards, received nan at index 1"),
        ({"rewards": torch.ones(3, 1)}, "rewards to be one-dimensional"),
    ],
)
def test_errors_say_what_was_received(change, message):
    with pytest.raises(ValueError, match=message):
        token_advantages(**(GOOD | change))


def test_the_loop_above_on_a_case_done_on_paper():
    got = by_hand(
        [[1.0, 2.0], [4.0]],
        [[1, 2], [1]],
        [0, 0],
        gamma=0.5,
        baseline="mean",
        scale="none",
        level="sequence",
    )
    assert got == [2 - 3, 2 - 3, 2 - 3, 4 - 3]
