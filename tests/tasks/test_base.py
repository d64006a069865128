import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast.tasks.arithmetic import build_tokenizer
from airl_fast.tasks.base import (
    Example,
    Message,
    encode_completion,
    encode_prompt,
    split_steps,
    step_index,
)

CHAT = (
    "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}#{% endif %}"
)


@settings(deadline=None)
@given(st.text(alphabet="ab\n;"))
def test_steps_join_to_the_text_and_hold_their_characters(text):
    for boundary in (r"\n", ";", r"\n+"):
        steps = split_steps(text, boundary)
        assert "".join(steps) == text
        assert "" not in steps
        start = 0
        for i, step in enumerate(steps):
            for place in range(start, start + len(step)):
                assert step_index(text, place, boundary) == i
            start += len(step)


def test_messages_go_through_the_chat_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    example = Example(prompt=(Message(role="user", content="1+1"),))
    assert tokenizer.decode(encode_prompt(example, tokenizer)) == "1+1;#"


def test_messages_without_a_chat_template_are_refused():
    example = Example(prompt=(Message(role="user", content="1+1"),), id="x-1")
    with pytest.raises(ValueError, match=r"'x-1'.*no chat template; set task\.chat=false"):
        encode_prompt(example, build_tokenizer())


def test_prompt_keeps_its_front_token_and_loses_a_closing_one():
    def tokenizer(text):
        return types.SimpleNamespace(input_ids=[7, *map(ord, text), 2])

    tokenizer.eos_token_id = 2
    assert encode_prompt(Example(prompt="a"), tokenizer) == [7, 97]


def test_completion_with_and_without_end_of_text():
    tokenizer = build_tokenizer()
    ids = encode_completion("1+1=2", tokenizer, end_of_text=False)
    assert tokenizer.decode(ids) == "1+1=2"
    assert encode_completion("1+1=2", tokenizer) == [*ids, tokenizer.eos_token_id]


def test_empty_texts_and_inner_end_of_text_are_refused():
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompt(Example(prompt=""), tokenizer)
    with pytest.raises(ValueError, match="no tokens"):
        encode_completion("", tokenizer)
    with pytest.raises(ValueError, match="contains the end-of-text token '<eos>'"):
        encode_completion("1<eos>2", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_completion("1", tokenizer)
