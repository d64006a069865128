"""What a step sees: every draw is a function of its position, whatever was drawn before."""

import random
from collections import Counter

import pytest

from airl_fast.batches import (
    Replay,
    Shuffled,
    TraceMaker,
    check_lengths,
    derive_seed,
    encode,
)
from airl_fast.packing import Source, Trace
from airl_fast.schema import TaskConfig
from airl_fast.spans import span_rule
from airl_fast.tasks import Example, load_task
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def task():
    return load_task(
        TaskConfig(name="arithmetic", demonstrations=12, unlabelled=5, validation=2, test=2)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make_maker(task, tokenizer, **options):
    rule = span_rule("step", boundary=task.step_boundary, tokenizer=tokenizer)
    return TraceMaker(task, tokenizer, rule, **options)


def test_seeds_differ_by_seed_purpose_and_position():
    seeds = {
        derive_seed(seed, purpose, position)
        for seed in range(5)
        for purpose in ("rollouts", "contrast", "1")
        for position in range(50)
    }
    assert len(seeds) == 5 * 3 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "rollouts", 7) == derive_seed(3, "rollouts", 7)


def test_a_demonstration_that_cannot_be_made_wrong_is_named(task, tokenizer):
    maker = make_maker(task, tokenizer, perturbations=("swap",))
    maker.check_perturbable(task.train)
    one_step = Example(prompt="1+1=", completion="1+1=2;", id="single")
    with pytest.raises(ValueError, match="'single': no perturbation among swap"):
        maker.check_perturbable([*task.train, one_step])


def test_traces_that_would_not_fit_are_refused_before_the_first_step(task, tokenizer):
    problems = encode(task.train, tokenizer)
    longest = max(len(p.prompt) + len(p.expert) for p in problems)
    for budget, context in ((longest, float("inf")), (999, longest)):
        check_lengths(problems, max_new_tokens=1, token_budget=budget, context=context)
    with pytest.raises(
        ValueError, match=r"'arithmetic-train-\d+': .* do not fit run\.token_budget"
    ):
        check_lengths(problems, max_new_tokens=1, token_budget=longest - 1, context=999)
    with pytest.raises(ValueError, match="completion of up to 300 do not fit the model's context"):
        check_lengths(problems, max_new_tokens=300, token_budget=999, context=256)


def test_every_epoch_holds_every_item_once_in_an_order_of_its_own():
    shuffled = Shuffled(range(20), 0, "x")
    epochs = [shuffled.take(20 * i, 20) for i in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_position_holds_the_same_item_however_it_is_reached():
    whole = Shuffled(range(7), 5, "x").take(0, 50)
    reader, order = Shuffled(range(7), 5, "x"), list(range(40))
    random.Random(0).shuffle(order)
    for start in order:
        assert reader.take(start, 9) == whole[start : start + 9]  # across epochs, and backwards
    assert Shuffled(range(7), 6, "x").take(0, 50) != whole
    assert Shuffled(range(7), 5, "y").take(0, 50) != whole


def test_positions_are_even_over_the_items():
    counts = Counter(Shuffled(range(3), 0, "x").take(5, 300))
    assert set(counts.values()) == {100}


def test_problems_are_encoded_with_an_end(tokenizer):
    problems = encode(
        [Example(prompt="1+2=", completion="1+2=3;#3."), Example(prompt="2+2=")], tokenizer
    )
    assert tokenizer.decode(problems[0].prompt) == "1+2="
    assert tokenizer.decode(problems[0].expert) == "1+2=3;#3.<eos>"
    assert problems[0].expert[-1] == tokenizer.eos_token_id
    assert problems[1].expert is None


def test_traces_say_where_they_are_from(task, tokenizer):
    maker = make_maker(task, tokenizer)
    problem = encode(task.train[:1], tokenizer)[0]
    expert = maker.expert(problem, 4)
    assert (expert.source, expert.group) == (Source.EXPERT, 4)
    assert (expert.prompt, expert.completion) == (problem.prompt, problem.expert)
    drawn = maker.trace(problem, problem.expert[:3], Source.POLICY, 2)
    assert (drawn.source, drawn.group, sum(drawn.span_lengths)) == (Source.POLICY, 2, 3)
    assert drawn.prompt == problem.prompt


def test_a_perturbed_trace_is_the_demonstration_made_wrong(task, tokenizer):
    problems = encode(task.train, tokenizer)
    for kind in ("corrupt", "digit", "swap", "drop"):
        maker = make_maker(task, tokenizer, perturbations=(kind,))
        for i, problem in enumerate(problems):
            trace = maker.perturbed(problem, 3, i)
            assert (trace.source, trace.group) == (Source.PERTURBED, 3)
            assert trace.prompt == problem.prompt
            assert trace.completion != problem.expert
            assert trace.completion[-1] == tokenizer.eos_token_id
            assert trace == maker.perturbed(problem, 3, i)
    maker = make_maker(task, tokenizer)
    assert len({maker.perturbed(problems[0], 0, seed).completion for seed in range(20)}) > 3


def traces(count, start=0):
    return [
        Trace(prompt=(1, 2), completion=(i, 3), span_lengths=(1, 1), group=i % 3)
        for i in range(start, start + count)
    ]


def test_replay_keeps_the_newest():
    replay = Replay(5)
    replay.add(traces(3))
    assert replay.traces == traces(3)
    replay.add(traces(4, start=3))
    assert replay.traces == traces(5, start=2)
    replay.add(traces(9, start=20))
    assert replay.traces == traces(5, start=24)
    empty = Replay(0)
    empty.add(traces(3))
    assert empty.draw(2, 0) == []


def test_replay_draws_without_replacement_by_seed():
    replay = Replay(10)
    replay.add(traces(10))
    drawn = replay.draw(4, 7)
    assert len({t.completion for t in drawn}) == 4
    assert drawn == replay.draw(4, 7)
    assert {tuple(t.completion for t in replay.draw(4, s)) for s in range(5)}.__len__() > 1
    assert sorted(t.completion for t in replay.draw(99, 1)) == [t.completion for t in traces(10)]
    counts = Counter(t.completion for s in range(500) for t in replay.draw(4, s))
    assert all(150 < count < 250 for count in counts.values())  # 200 each, deviation 11


def test_replay_comes_back():
    import json

    replay, other = Replay(6), Replay(6)
    replay.add(traces(6))
    other.restore(json.loads(json.dumps(replay.state())))
    assert other.traces == replay.traces
    assert other.draw(3, 1) == replay.draw(3, 1)
