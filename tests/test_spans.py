from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from airl_fast.spans import decode, span_offsets, span_rule

from .tiny_models import tiny_tokenizer

CHARACTERS = tiny_tokenizer()


def _byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges within and across the bytes of multi-byte characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a 中丰\n丱b\n\n中丱 × é;\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _metaspace() -> PreTrainedTokenizerFast:
    """A decoder that drops the first space, so that tokens decode otherwise when alone."""
    tokenizer = Tokenizer(
        models.WordLevel({"▁go": 0, "▁on": 1, "\n": 2, "</s>": 3}, unk_token=None)
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BYTES = _byte_level()


def _byte_ends(ids: list[int]) -> list[int]:
    """Characters of the text complete after each token, counted from the tokens' own bytes."""
    text = decode(ids, BYTES)
    char_ends = list(accumulate(len(c.encode()) for c in text))
    token_ends = accumulate(len(t) for t in BYTES.convert_ids_to_tokens(ids))  # 1 char a byte
    return [sum(end <= byte for end in char_ends) for byte in token_ends]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [("dense", (1,) * 10), ("interval", (4, 4, 2)), ("sparse", (10,))],
)
def test_text_free_granularities(granularity, expected):
    assert span_rule(granularity, interval=4)(list(range(10))) == expected


def test_interval_may_exceed_the_completion():
    assert span_rule("interval", interval=8)([5, 6]) == (2,)


@pytest.mark.parametrize(
    ("text", "boundary", "expected"),
    [
        ("ab\ncd\ne", "\n", (3, 3, 1)),
        ("ab\ncd\n", "\n", (3, 3)),  # a boundary at the very end opens no further span
        ("abcd", "\n", (4,)),
        ("\nab", "\n", (1, 2)),
        ("a;b;;c", r";+", (2, 3, 1)),
        ("1+1=2;7", r"(?<=;)", (6, 1)),  # a match of no width ends where it stands
        ("\n", "\n", (1,)),
    ],
)
def test_steps(text, boundary, expected):
    rule = span_rule("step", boundary=boundary, tokenizer=CHARACTERS)
    assert rule(CHARACTERS.encode(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("ab\ncd\n<eos>", (3, 4)), ("ab\ncd<eos>", (3, 3)), ("ab<eos>", (3,))]
)
def test_end_of_text_alone_joins_the_last_step(text, expected):
    ids = [*CHARACTERS.encode(text.removesuffix("<eos>")), CHARACTERS.eos_token_id]
    assert span_rule("step", tokenizer=CHARACTERS)(ids) == expected


def test_boundary_ids():
    assert span_rule("step", boundary_ids=[9])([1, 9, 2, 2, 9, 3]) == (2, 3, 1)
    rule = span_rule("step", boundary_ids=[9], tokenizer=CHARACTERS)
    assert rule([5, 9, CHARACTERS.eos_token_id]) == (3,)
    assert span_rule("step", boundary_ids=[9])([5, 9, CHARACTERS.eos_token_id]) == (2, 1)


def test_boundary_that_straddles_tokens():
    newline, other = BYTES.encode("\n"), BYTES.encode("x")
    ids = other + newline + newline + other  # "x\n\nx", the two newlines kept apart
    rule = span_rule("step", boundary="\n\n", tokenizer=BYTES)
    assert len(newline) == 1
    assert rule(ids) == (3, 1)


def test_boundary_inside_a_token():
    vocabulary = {"a": 0, ";\nb": 1, "c": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.decoder = decoders.Fuse()
    rule = span_rule("step", tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert rule([0, 1, 2, 2]) == (2, 2)


def test_characters_split_over_tokens():
    ids = [i for c in "中\n丰" for i in BYTES.convert_tokens_to_ids(_tokens_of_bytes(c))]
    assert len(ids) == 7
    assert span_rule("step", tokenizer=BYTES)(ids) == (4, 3)
    assert span_offsets(ids, (1,) * 7, BYTES) == [
        (0, 0), (0, 0), (0, 1), (1, 2), (2, 2), (2, 2), (2, 3),
    ]  # fmt: skip
    assert span_offsets(ids, (4, 3), BYTES) == [(0, 2), (2, 3)]


def test_a_completion_that_ends_inside_a_character():
    ids = BYTES.convert_tokens_to_ids(_tokens_of_bytes("a中")[:-1])
    assert decode(ids, BYTES) == "a\ufffd"
    assert span_offsets(ids, (1, 1, 1), BYTES) == [(0, 1), (1, 1), (1, 2)]


def test_decoder_that_drops_the_first_space():
    tokenizer = _metaspace()
    ids = [0, 1, 2, 0, 3]
    assert decode(ids, tokenizer) == "go on\n go</s>"
    assert span_rule("step", tokenizer=tokenizer)(ids) == (3, 2)
    offsets = span_offsets(ids, (1,) * 5, tokenizer)
    assert offsets == [(0, 2), (2, 5), (5, 6), (6, 9), (9, 13)]


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab 中丰丱×é;\n\ufffd😀", min_size=1, max_size=30), data=st.data())
def test_offsets_partition_the_text_exactly(text, data):
    ids = data.draw(st.sampled_from([BYTES.encode(text), _split_bytes(text)]))
    lengths = data.draw(_partitions(len(ids)))
    offsets = span_offsets(ids, lengths, BYTES)
    assert "".join(text[a:b] for a, b in offsets) == text
    assert all(end == start for (_, end), (start, _) in pairwise(offsets))
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
    if "\ufffd" not in text:  # which is also what an incomplete character looks like
        ends = _byte_ends(ids)
        assert [end for _, end in offsets] == [ends[i - 1] for i in accumulate(lengths)]


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab中\n;", min_size=1, max_size=30), data=st.data())
def test_steps_end_at_the_token_that_completes_a_match(text, data):
    ids = data.draw(st.sampled_from([BYTES.encode(text), _split_bytes(text)]))
    lengths = span_rule("step", boundary=r"\n|;", tokenizer=BYTES)(ids)
    ends = _byte_ends(ids)
    boundaries = [i + 1 for i, c in enumerate(text) if c in "\n;"]
    expected = {next(t + 1 for t, end in enumerate(ends) if end >= b) for b in boundaries}
    assert sum(lengths) == len(ids)
    assert set(accumulate(lengths)) == expected | {len(ids)}


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(1, 256), min_size=1, max_size=20))
def test_any_bytes_partition_their_text(ids):
    text = decode(ids, BYTES)
    offsets = span_offsets(ids, (1,) * len(ids), BYTES)
    assert "".join(text[a:b] for a, b in offsets) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "token"}, "expected granularity dense.*received 'token'"),
        ({"granularity": "interval", "interval": 0}, "interval of 1 token or more, received 0"),
        ({"granularity": "step"}, "expected a tokenizer"),
        ({"granularity": "step", "boundary_ids": []}, "boundary_ids to hold a token id"),
        ({"granularity": "step", "boundary": "(", "tokenizer": CHARACTERS}, "regular expression"),
        ({"granularity": "step", "boundary": r"\n|$", "tokenizer": CHARACTERS}, "some text"),
        ({"granularity": "step", "boundary": "", "tokenizer": CHARACTERS}, "some text"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        span_rule(**arguments)


@pytest.mark.parametrize("granularity", ["dense", "interval", "step", "sparse"])
def test_empty_completion_is_refused(granularity):
    with pytest.raises(ValueError, match="completion of 1 token or more"):
        span_rule(granularity, tokenizer=CHARACTERS)([])


@pytest.mark.parametrize("lengths", [(1, 1), (3, 0), (4,)])
def test_spans_that_do_not_cover_the_completion_are_refused(lengths):
    with pytest.raises(ValueError, match="sum to the 3 tokens"):
        span_offsets(CHARACTERS.encode("abc"), lengths, CHARACTERS)


def test_decoder_that_looks_ahead_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token=None))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "z")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(ValueError, match="offsets are undefined"):
        span_offsets([0, 1], (1, 1), wrapped)


def _tokens_of_bytes(text: str) -> list[str]:
    """One token per UTF-8 byte, in the byte-level alphabet."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list(pre_tokenizer.pre_tokenize_str(text)[0][0])


def _split_bytes(text: str) -> list[int]:
    return BYTES.convert_tokens_to_ids(_tokens_of_bytes(text))


@st.composite
def _partitions(draw, total: int) -> tuple[int, ...]:
    cuts = draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=total - 1)) - {total}
    return tuple(b - a for a, b in pairwise([0, *sorted(cuts), total]))
