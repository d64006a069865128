import random

import pytest

from airl_fast.tasks.base import split_steps
from airl_fast.tasks.choices import SENTENCES, find_choice, own_text, wrong_choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So it is. The answer is (C).", "C"),
        ("the answer is C", "C"),
        ("The answer is **(B)**", "B"),
        ("Answer: D. because", "D"),
        ("The answer is: (e)", "E"),
        (r"thus \boxed{F}", "F"),
        (r"thus \boxed{\text{(G)}}.", "G"),
        ("<answer>H</answer>", "H"),
        ("The answer is option (I).", "I"),
        ("(J)", "J"),
        ("The answer is (A). No: the answer is (B).", "B"),
        ("The answer is (A) or (C).", None),
        ("The answer is A and B", None),
        ("The answer is A good idea", None),
        ("the answer is unknown", None),
        ("The answer is not in the list. (A)", None),
        ("We can eliminate options A and D", None),
        ("The answer is (K).", None),
        ("", None),
    ],
)
def test_find_choice_reads_a_single_letter_or_nothing(text, letter):
    assert find_choice(text) == letter


def test_a_letter_beyond_the_options_is_no_answer():
    assert find_choice("The answer is (F).", options=4) is None
    assert find_choice("The answer is (D).", options=4) == "D"


def test_own_text_stops_at_an_invented_question():
    text = "So the answer is (A).\n\nQuestion:\nWhich?\nAnswer: B."
    assert own_text(text) == "So the answer is (A)."
    assert find_choice(own_text(text)) == "A"
    assert own_text("Why? A Question: none. ") == "Why? A Question: none."


def test_sentences_are_steps():
    text = "Let x be 3.5 m. It is e.g.\n1. Long. Done! The answer is (A)."
    steps = split_steps(text, SENTENCES)
    assert "".join(steps) == text
    assert steps == [
        "Let x be 3.5 m.",
        " It is e.g.",
        "\n1. Long.",
        " Done!",
        " The answer is (A).",
    ]
    assert split_steps("One\n\nTwo\nThree", SENTENCES) == ["One\n", "\nTwo\n", "Three"]


def test_wrong_choice_changes_one_step():
    text = "We have 3 + 4 = 7. The answer is (D)."
    seen = set()
    for seed in range(30):
        wrong, step = wrong_choice(text, SENTENCES, random.Random(seed))
        before, after = split_steps(text, SENTENCES), split_steps(wrong, SENTENCES)
        assert [i for i in range(2) if before[i] != after[i]] == [step]
        if step == 1:
            assert find_choice(wrong) in ("A", "B", "C")
        seen.add(step)
    assert seen == {0, 1}
    wrong, step = wrong_choice("It is so. The answer is (A).", SENTENCES, random.Random(0))
    assert (find_choice(wrong) in ("B", "C"), step) == (True, 1)
    with pytest.raises(ValueError, match="neither a number nor"):
        wrong_choice("It is so.", SENTENCES, random.Random(0))
