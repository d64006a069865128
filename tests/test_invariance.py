"""Identical bits however requests are grouped and ordered; padding against its definition."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast import Discriminator, RewardScorer
from airl_fast.invariance import least_rows, padded
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.scores import Trained
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = ["what is it?", "2+2=", "a longer prompt, which says more than the others do.", "?"]


def scorer_of(name, head="lm", passes=None, policy=True, dtype=torch.float32):
    tokenizer = tiny_tokenizer()
    models = (tiny_model(name, seed=seed).eval().to(dtype) for seed in (0, 1))
    body, other = (LanguageModel(model, tokenizer, Origin(model="tiny")) for model in models)
    discriminator = Discriminator(body, head=head, trunk="own", width=32)
    if head == "score":
        torch.manual_seed(0)
        discriminator.weight.data.normal_()
    trained = Trained(granularity="step", interval=1, boundary="\n", logit="f-logp", reward="f",
                      temperature=0.9, task="jsonl")  # fmt: skip
    return RewardScorer(
        discriminator, trained, policy=other if policy else None, passes=passes, token_budget=300
    )


def requests(scorer, count=10):
    rng = random.Random(0)
    pairs = []
    for i in range(count):
        length = rng.choice([1, 2, 5, 17, 40, 90])
        text = "".join(rng.choice("abc 123+=.\n") for _ in range(length)) + "."
        pairs.append(scorer.encode(PROMPTS[i % len(PROMPTS)], text))
    return pairs


_known = {}


def known(key):
    """A scorer, requests, and their scores together; made once."""
    if key not in _known:
        scorer = scorer_of(*key)
        pairs = requests(scorer)
        _known[key] = scorer, pairs, scorer.score_encoded(pairs)
    return _known[key]


CASES = [
    ("llama", "lm", None, True),
    ("llama", "lm", "alone", True),
    ("llama", "score", None, True),
    ("gemma3", "lm", None, False),
    ("gpt2", "lm", None, True),
    ("llama", "lm", None, True, torch.bfloat16),
    ("qwen3", "score", None, False, torch.bfloat16),
    ("llama", "lm", None, True, torch.float16),
]


@pytest.mark.parametrize("key", CASES, ids=str)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_bits_do_not_depend_on_the_grouping(key, data):
    scorer, pairs, expected = known(key)
    assert scorer.invariant
    order = data.draw(st.permutations(range(len(pairs))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(pairs) - 1), max_size=5)))
    for first, last in zip([0, *cuts], [*cuts, len(pairs)], strict=True):
        chosen = order[first:last]
        for i, one in zip(chosen, scorer.score_encoded([pairs[i] for i in chosen]), strict=True):
            assert one == expected[i]  # every float of it, bit for bit


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_product_whose_bits_depend_on_the_rows_is_found_out(name, monkeypatch):
    """As an AVX-512 machine has it: rows are summed in two parts where there are few of them."""
    plain = torch.nn.functional.linear

    def split(least):
        def linear(x, weight, bias=None):
            if x.shape[-2] >= least:
                return plain(x, weight, bias)
            half = x.shape[-1] // 2
            first = plain(x[..., :half].contiguous(), weight[:, :half].contiguous())
            return first + plain(x[..., half:].contiguous(), weight[:, half:].contiguous(), bias)

        return linear

    model = tiny_model(name)
    assert least_rows(model) in (8, 256)
    monkeypatch.setattr(torch.nn.functional, "linear", split(200))
    assert least_rows(model) == 256
    monkeypatch.setattr(torch.nn.functional, "linear", split(1000))
    assert least_rows(model) is None


def test_repeats_and_more_threads():
    scorer, pairs, expected = known(CASES[0])
    assert all(one == expected[3] for one in scorer.score_encoded([pairs[3]] * 3))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = scorer.score_encoded(pairs[3:5])
        assert scorer.score_encoded(pairs[3:4]) == together[:1]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
def test_both_kinds_of_passes_agree(name):
    packed, alone = scorer_of(name, passes="packed"), scorer_of(name, passes="alone")
    pairs = requests(packed)
    for one, other in zip(packed.score_encoded(pairs), alone.score_encoded(pairs), strict=True):
        assert one.tokens.f == pytest.approx(other.tokens.f, abs=1e-3)
        assert one.tokens.logp == pytest.approx(other.tokens.logp, abs=1e-3)


def test_what_is_no_plain_linear_layer_is_scored_alone():
    assert scorer_of("llama").passes == "packed"
    assert least_rows(tiny_model("gpt2")) is None  # Conv1D
    gpt2 = scorer_of("gpt2")
    assert (gpt2.passes, gpt2.invariant) == ("alone", True)
    assert not scorer_of("gpt2", passes="packed").invariant


@given(
    st.integers(1, 5000),
    st.sets(st.sampled_from([8, 24, 32, 48, 64, 192, 576, 1536]), min_size=1),
    st.integers(1, 16),
    st.sampled_from([8, 256]),
)
@settings(max_examples=200, deadline=None)
def test_padding_makes_whole_vectors(tokens, widths, threads, least):
    count = padded(tokens, frozenset(widths), threads, least)
    assert count >= max(tokens, least)
    assert count != tokens + 1
    for width in widths:
        parts = min(threads, -(-count * width // 32768))
        size = -(-count * width // parts)  # elements of a thread
        assert all((min(size, count * width - i * size)) % 32 == 0 for i in range(parts))


def test_usual_models_need_little_padding():
    assert padded(1760, frozenset({576, 192, 1536, 64}), 2, 8) <= 1762
    assert padded(1761, frozenset({576, 192, 1536, 64}), 2, 8) <= 1764
