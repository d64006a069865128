import random
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.negatives import KINDS, drop_step, perturb, replace_digit, swap_steps, told_apart
from airl_fast.packing import Source, Trace
from airl_fast.tasks.answers import wrong_number
from airl_fast.tasks.arithmetic import Arithmetic, sample_problem

ARITHMETIC = Arithmetic(demonstrations=1, unlabelled=0, validation=0, test=0)
TEXT = types.SimpleNamespace(
    name="text",
    step_boundary=r"\n",
    corrupt=lambda completion, rng: wrong_number(completion, r"\n", rng),
)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_wrong_trace(kind):
    rng = random.Random(0)
    for _ in range(200):
        trace = sample_problem(rng).trace()
        changed = perturb(ARITHMETIC, trace, rng, kinds=[kind])
        assert changed != trace
        if kind == "digit":
            places = [i for i, (a, b) in enumerate(zip(trace, changed, strict=True)) if a != b]
            assert len(places) == 1
            assert changed[places[0]].isdigit()
        if kind == "swap":
            assert sorted(changed.split(";")) == sorted(trace.split(";"))
        if kind == "drop":
            assert changed.count(";") == trace.count(";") - 1


@settings(deadline=None)
@given(st.text(alphabet="01 a\n", min_size=1), st.integers(0, 99))
def test_a_trace_is_changed_or_refused(text, seed):
    steps = [step for step in text.split("\n") if step.strip()]
    if any(c in "01" for c in text) or len(set(steps)) > 1:
        changed = perturb(TEXT, text, random.Random(seed))
        assert changed
        assert changed != text
    elif len(steps) < 2 and "\n" not in text:
        with pytest.raises(ValueError, match="no perturbation among"):
            perturb(TEXT, text, random.Random(seed))


def test_kinds_that_do_not_apply_give_way_to_those_that_do():
    for seed in range(20):
        assert perturb(TEXT, "one\ntwo", random.Random(seed)) == "two"
        assert perturb(TEXT, "one\ntwo\n", random.Random(seed)) in ("two\none\n", "one\n", "two\n")


def test_what_cannot_be_changed_raises_with_the_remedy():
    for text in ("one", "one\n", "same"):
        with pytest.raises(ValueError, match=r"no perturbation .*perturbed_per_update=0"):
            perturb(TEXT, text, random.Random(0))
    with pytest.raises(ValueError, match=r"no number to make wrong"):
        perturb(TEXT, "one", random.Random(0), kinds=["corrupt"])


@pytest.mark.parametrize("kinds", [["dgit"], []])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(ValueError, match="expected some of"):
        perturb(TEXT, "1", random.Random(0), kinds=kinds)


def test_text_level_edges():
    rng = random.Random(0)
    assert replace_digit("abc", ";", rng) is None
    assert swap_steps("a;a;b", ";", rng) is None  # equal steps; the last is incomplete
    assert drop_step("a;", ";", rng) is None
    assert drop_step("a;b", ";", rng) == "b"
    assert all(replace_digit("10", ";", random.Random(i))[0] != "0" for i in range(50))


def trace(completion, spans, source, group=0):
    return Trace(prompt=(1,), completion=completion, span_lengths=spans, group=group, source=source)


@pytest.mark.parametrize(
    ("completion", "spans", "changed"),
    [
        ((1, 2, 3, 4, 9, 6), (2, 3, 1), 1),  # in the middle of a span
        ((9, 2, 3, 4, 5, 6), (2, 3, 1), 0),
        ((1, 2, 3, 4, 5, 9), (2, 3, 1), 2),
        ((1, 2, 6), (2, 1), 1),  # a step dropped
        ((1, 2), (1, 1), 1),  # it ends where the expert goes on
        ((1, 2, 3, 4, 5, 6, 7), (2, 4, 1), 2),  # it goes on where the expert ends
        ((1, 9, 3, 9, 5, 6), (2, 3, 1), 0),  # the first of two
    ],
)
def test_of_a_perturbed_trace_the_first_changed_span_is_told_apart(completion, spans, changed):
    traces = [
        trace((1, 2, 3, 4, 5, 6), (2, 3, 1), Source.EXPERT),
        trace((9,), (1,), Source.EXPERT, group=1),
        trace((7, 8), (1, 1), Source.POLICY),
        trace(completion, spans, Source.PERTURBED),
    ]
    told = told_apart(traces, "changed")
    assert told[:3] == [[True] * 3, [True], [True] * 2]
    assert [i for i, mine in enumerate(told[3]) if mine] == [changed]
    assert told_apart(traces, "all") == [*told[:3], [True] * len(spans)]
