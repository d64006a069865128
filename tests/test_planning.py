import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.packing import pack
from airl_fast.planning import plan_micro_batches, plan_traces
from tests.test_packing import lists_of_traces, trace


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(50, 200))
def test_micro_batches_partition_within_the_budget(lengths, budget):
    plan = plan_micro_batches(lengths, budget)
    assert sorted(i for members in plan for i in members) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in members) for members in plan]
    assert all(0 < load <= budget for load in loads)
    assert all(members == sorted(members) for members in plan)
    assert sum(load * 2 <= budget for load in loads) <= 1  # two such would have been one


def test_micro_batches_of_gsm8k_lengths_waste_under_two_percent():
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(138) - 0.32**2 / 2, 0.32, 100_000)
    completions = rng.lognormal(np.log(124) - 0.45**2 / 2, 0.45, 100_000)
    lengths = np.clip(prompts + completions, 2, 2048).astype(int)
    assert abs(lengths.mean() - 262) < 2
    for budget in (4096, 16384, 65536):
        plan = plan_micro_batches(lengths.tolist(), budget)
        assert max(lengths[members].sum() for members in plan) <= budget
        assert 1 - lengths.sum() / (len(plan) * budget) < 0.02


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 9, 4], "fit the budget of 8 tokens, received 9 tokens at index 1"),
        ([3, 0], "every sequence to have a token, received 0 at index 1"),
    ],
)
def test_plans_refuse_what_cannot_be_placed(lengths, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(lengths, 8)


def _groups(num_prompts: int, per_prompt: int, prompt: int = 6, completion: int = 5):
    rng = np.random.default_rng(num_prompts)
    return [
        trace([p] * prompt, [1] * int(rng.integers(1, 2 * completion)), group=p)
        for p in range(num_prompts)
        for _ in range(per_prompt)
    ]


def _packed_tokens(batch, plan, share=True):
    return [pack([batch[i] for i in m], share_prompts=share).num_tokens for m in plan]


@settings(max_examples=60, deadline=None)
@given(
    batch=lists_of_traces, budget=st.integers(15, 60), ranks=st.integers(1, 4), share=st.booleans()
)
def test_trace_plans_partition_within_the_budget(batch, budget, ranks, share):
    plan = plan_traces(batch, budget, ranks=ranks, share_prompts=share)
    assert sorted(i for members in plan for i in members) == list(range(len(batch)))
    assert all(members for members in plan)
    assert max(_packed_tokens(batch, plan, share)) <= budget
    assert len(plan) % ranks == 0 or len(plan) == len(batch)


def test_a_prompt_that_fits_is_not_split():
    batch = _groups(20, 4)
    plan = plan_traces(batch, 120)
    homes = [{i // 4 for i in members} for members in plan]
    assert sum(map(len, homes)) == 20
    assert sum(_packed_tokens(batch, plan)) == pack(batch).num_tokens


def test_a_prompt_that_does_not_fit_is_split_and_counted_in_each_piece():
    batch = [trace([1] * 6, [2] * 4) for _ in range(8)]  # 6 + 32 tokens
    plan = plan_traces(batch, 20)
    assert [len(members) for members in plan] == [3, 3, 2]
    assert _packed_tokens(batch, plan) == [18, 18, 14]


@pytest.mark.parametrize(("prompts", "ranks"), [(40, 4), (5, 4), (2, 4), (64, 8)])
def test_ranks_get_near_equal_work(prompts, ranks):
    batch = _groups(prompts, 8)
    plan = plan_traces(batch, 200, ranks=ranks)
    loads = _packed_tokens(batch, plan)
    assert len(plan) % ranks == 0
    assert max(loads) <= 200
    assert max(loads) <= 1.25 * sum(loads) / len(loads)


def test_fewer_traces_than_ranks_give_one_micro_batch_each():
    assert sorted(plan_traces(_groups(1, 3), 100, ranks=4)) == [[0], [1], [2]]


def test_trace_plans_refuse_what_cannot_be_placed():
    batch = [trace([1], [2]), trace([1] * 5, [2] * 6)]
    with pytest.raises(ValueError, match="budget of 10 tokens, received 11 tokens at index 1"):
        plan_traces(batch, 10)
    with pytest.raises(ValueError, match="ranks of 1 or more"):
        plan_traces(batch, 20, ranks=0)
    assert plan_traces([], 10) == []
