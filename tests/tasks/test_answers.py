import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.tasks.answers import (
    canonical,
    find_answer,
    parse_number,
    same_answer,
    wrong_number,
)
from airl_fast.tasks.base import split_steps


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("$1,200.50.", "1200.5"),
        ("1200.5 dollars", "1200.5"),
        ("72.00", "72"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\\$72\\%", "72"),
        ("50%", "50"),
        ("**72**", "72"),
        ("72.", "72"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("1,000,000", "1000000"),
        ("1" + "0" * 40 + "1", "1" + "0" * 40 + "1"),
        ("3/4", None),
        ("12,34", None),
        ("3 + 4 = 7", None),
        ("1.2.3", None),
        ("1e5", None),
        ("5, 6", None),
        ("--5", None),
        ("apples 5", None),
        ("", None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


@settings(deadline=None)
@given(st.integers(-(10**15), 10**15))
def test_every_way_to_write_an_integer_is_the_same_number(value):
    forms = [str(value), f"{value:,}", f"{value}.00", f"${value:,}.", f" {value}% "]
    assert {parse_number(form) for form in forms} == {str(value)}


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_the_parsers(text):
    number = parse_number(text)
    assert number is None or parse_number(number) == number
    assert canonical(canonical(text)) == canonical(text) or number is None
    find_answer(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("steps\n#### 72", "72"),
        ("#### 72\n#### 73", "72"),
        ("####72 apples\nQuestion: more", "72 apples"),
        ("no hashes within a line #### 72", None),
        (r"so \boxed{71}, then \boxed{72}", "72"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{72} and \boxed{73", "72"),
        ("<think>x</think><answer> B </answer>", "B"),
        ("The answer is 7. No: the answer is: 72.", "72."),
        ("72", None),
        ("", None),
    ],
)
def test_find_answer(text, answer):
    assert find_answer(text) == answer


def test_same_answer():
    assert same_answer("$1,200 in all", "1200")
    assert same_answer("(B)", "b.")
    assert same_answer("New  York", "new york.")
    assert not same_answer("72 apples", "73")
    assert not same_answer("B or C", "B")
    assert not same_answer("", "72")


def test_wrong_number_changes_one_number_of_the_step_it_names():
    text = "She sold 48/2 = 24 clips in 3 weeks.\nShe has none.\nIn all 48+24 = 72.\n#### 72"
    seen = set()
    for seed in range(60):
        changed, step = wrong_number(text, r"\n", random.Random(seed))
        pairs = zip(split_steps(text, r"\n"), split_steps(changed, r"\n"), strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if a != b] == [step]
        seen.add(step)
        assert "48/2 = " in changed  # the result is what changes
        assert "in 3 weeks" in changed
    assert seen == {0, 2}


def test_wrong_number_keeps_a_calculator_mark_in_step():
    text = "It is 48/2=$<<48/2=24.00>>24.00 then."
    for seed in range(20):
        changed, _ = wrong_number(text, r"\n", random.Random(seed))
        inside, outside = changed.split("48/2=")[2].split(">>")
        assert inside == outside.split()[0] != "24.00"


def test_wrong_number_falls_back_to_the_answer_line_and_refuses_no_number():
    changed, step = wrong_number("None are left.\n#### 0", r"\n", random.Random(0))
    assert step == 1
    assert changed != "None are left.\n#### 0"
    with pytest.raises(ValueError, match="no number"):
        wrong_number("none at all", r"\n", random.Random(0))
    changed, _ = wrong_number("<<48>>", r"\n", random.Random(0))
    assert changed != "<<48>>"


@settings(deadline=None)
@given(st.text(alphabet="0123456789=<>,.# \nab$", min_size=1), st.integers(0, 99))
def test_wrong_number_always_changes_exactly_its_step(text, seed):
    if not any(c in "0123456789" for c in text):
        return
    changed, step = wrong_number(text, r"\n", random.Random(seed))
    pairs = zip(split_steps(text, r"\n"), split_steps(changed, r"\n"), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if a != b] == [step]
