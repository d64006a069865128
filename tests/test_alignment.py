"""Rewards and log-probabilities across real tokenizers: exact, or refused with the reason."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from airl_fast import Discriminator, RewardScorer
from airl_fast.alignment import Aligner, project
from airl_fast.encoding import PairEncoder, text_offsets
from airl_fast.scores import Scored, StepScore, TokenScores, Trained
from airl_fast.spans import decode
from tests.two_tokenizers import TEXTS, byte_bpe, policy_of, unigram

WORDS, ACROSS, PIECES = byte_bpe(), byte_bpe(words=False), unigram()


def encoder(tokenizer):
    return PairEncoder(tokenizer, "\n", len(tokenizer))


def spelled(pair, tokenizer):
    """The text of each step, decoded from its tokens alone where that is possible."""
    texts, first = [], 0
    for length in pair.step_lengths:
        end = first + length
        texts.append(decode(pair.completion[:end], tokenizer).removesuffix(tokenizer.eos_token))
        first = end
    return texts


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_steps_of_two_tokenizers_hold_the_same_characters(text, ended):
    pair = encoder(WORDS).encode("q", text, end_of_text=ended)
    aligned = Aligner(encoder(WORDS), encoder(PIECES), merge_steps=False).align("q", pair)
    other = aligned.of_policy
    assert aligned.step_lengths == pair.step_lengths
    assert other.completion != pair.completion
    assert (other.completion[-1] == PIECES.eos_token_id) == ended
    assert spelled(aligned, WORDS) == spelled(other, PIECES)
    assert spelled(aligned, WORDS)[-1] == text


def test_a_step_end_inside_a_token_is_refused_or_joined():
    text = TEXTS[1]  # "fibre.\r\nHa" is one token of ACROSS
    pair = encoder(WORDS).encode("q", text)
    with pytest.raises(ValueError, match=r"step 0 ends at character 37, inside the token .*merge_"):
        Aligner(encoder(WORDS), encoder(ACROSS), merge_steps=False).align("q", pair)
    joined = Aligner(encoder(WORDS), encoder(ACROSS), merge_steps=True).align("q", pair)
    assert len(joined.step_lengths) < len(pair.step_lengths)
    assert sum(joined.step_lengths) == len(pair.completion)
    assert sum(joined.of_policy.step_lengths) == len(joined.of_policy.completion)
    assert spelled(joined, WORDS) == spelled(joined.of_policy, ACROSS)


def test_a_step_end_amid_the_bytes_of_a_character_is_refused():
    emoji = encoder(ACROSS).encode("q", "a🎈b")
    half = next(i for i, (start, end) in enumerate(emoji.offsets) if start == end) + 1
    pair = replace(emoji, step_lengths=(half, len(emoji.completion) - half))
    with pytest.raises(ValueError, match="inside the token"):
        Aligner(encoder(ACROSS), encoder(WORDS), merge_steps=False).align("q", pair)
    joined = Aligner(encoder(ACROSS), encoder(WORDS), merge_steps=True).align("q", pair)
    assert joined.step_lengths == (len(emoji.completion),)


def test_what_cannot_meet_is_refused():
    aligner = Aligner(encoder(WORDS), encoder(PIECES), merge_steps=True)
    ids = encoder(WORDS).encode(WORDS("q").input_ids, "2 + 1 = 3.")
    with pytest.raises(ValueError, match="prompt is token ids"):
        aligner.align(WORDS("q").input_ids, ids)
    eos = WORDS.eos_token_id
    twice = encoder(WORDS).encode("q", [*WORDS("3.").input_ids, eos, eos])
    with pytest.raises(ValueError, match="ends with the special tokens"):
        aligner.align("q", twice)
    lossy = unigram()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"write the completion differently: 'Janet.* at char.* 0"):
        Aligner(encoder(WORDS), encoder(lossy), merge_steps=True).align(
            "q", encoder(WORDS).encode("q", "Janet has 3.")
        )


def scored(text, ends):
    """Steps of the values 1, 10, 100, ... that end at these characters."""
    steps = tuple(
        StepScore(text=text[a:b], start=a, end=b, f=10.0**i, reward=-(10.0**i))
        for i, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    )
    tokens = TokenScores(ids=(), offsets=(), f=(), logp=None, reward=None)
    return Scored(text=text, f=0.0, reward=None, granularity="step", steps=steps, tokens=tokens)


@given(st.text(alphabet="ab 12.\n\r=é日🎉👩\u200d🚀", min_size=1, max_size=30), st.data())
@settings(max_examples=40, deadline=None)
def test_projection_is_exact_or_refused(text, data):
    ends = sorted(
        data.draw(st.sets(st.integers(1, len(text) - 1)) if len(text) > 1 else st.just([]))
    )
    ends.append(len(text))
    one = scored(text, ends)
    for tokenizer in (WORDS, ACROSS, PIECES):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if text_offsets(tuple(ids), tokenizer)[0] != text:
            continue
        prefixes = {len(decode(ids[:k], tokenizer)): k for k in range(1, len(ids) + 1)
                    if text.startswith(decode(ids[:k], tokenizer))}  # fmt: skip
        if all(end in prefixes for end in ends):
            values = project(one, ids, tokenizer)
            expected = [0.0] * len(ids)
            for i, end in enumerate(ends):
                first = min(
                    k for k in range(1, len(ids) + 1) if decode(ids[:k], tokenizer) == text[:end]
                )
                expected[(len(ids) if i + 1 == len(ends) else first) - 1] += 10.0**i
            assert values == expected
        else:
            with pytest.raises(ValueError, match="inside the token"):
                project(one, ids, tokenizer)
        for credit in ("last", "spread"):
            joined = project(one, ids, tokenizer, credit=credit, merge_steps=True)
            assert sum(joined) == pytest.approx(sum(10.0**i for i in range(len(ends))))


def test_projection_credits_the_last_token_or_spreads():
    text = "2 + 1 = 3.\n#### 3"
    one = scored(text, [11, 17])
    ids = [*WORDS(text, add_special_tokens=False).input_ids, WORDS.eos_token_id]
    cut = next(k for k in range(len(ids)) if decode(ids[:k], WORDS) == text[:11])
    last = project(one, ids, WORDS)
    assert {i: v for i, v in enumerate(last) if v} == {cut - 1: 1.0, len(ids) - 1: 10.0}
    spread = project(one, ids, WORDS, by="reward", credit="spread")
    assert spread[:cut] == [-1.0 / cut] * cut
    assert spread[cut:] == [-10.0 / (len(ids) - cut)] * (len(ids) - cut)
    with pytest.raises(ValueError, match="do not spell the completion"):
        project(one, ids[1:], WORDS)
    with pytest.raises(ValueError, match="received none"):
        project(one, [], WORDS)
    with pytest.raises(ValueError, match="credit 'last' or 'spread'"):
        project(one, ids, WORDS, credit="first")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    reward, policy = policy_of(WORDS, folder / "r"), policy_of(PIECES, folder / "p", seed=1)
    return folder, Discriminator.create(reward), policy


def trained(granularity="step"):
    return Trained(granularity=granularity, interval=2, boundary="\n", logit="f-logp", reward="f",
                   temperature=0.8, task="gsm8k")  # fmt: skip


def plain_logp(folder, prompt, completion, temperature):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logp[range(len(completion)), list(completion)]


@pytest.mark.parametrize("passes", ["packed", "alone"])
def test_a_policy_of_another_tokenizer_gives_rewards_of_steps(two, passes):
    folder, discriminator, policy = two
    scorer = RewardScorer(discriminator, trained(), policy=policy, passes=passes)
    for text, one in zip(TEXTS, scorer.score(["How many?"] * 3, TEXTS), strict=True):
        assert one.tokens.logp is one.tokens.reward is None
        values = {}
        for name, tokenizer, temperature in (("r", WORDS, 1.0), ("p", PIECES, 0.8)):
            prompt = tokenizer("How many?").input_ids
            ids = tokenizer(text, add_special_tokens=False).input_ids
            logp = plain_logp(folder / name, prompt, [*ids, tokenizer.eos_token_id], temperature)
            lines = text.count("\n") + 1
            ends = [next(k for k in range(1, len(ids) + 1)
                         if decode(ids[:k], tokenizer).count("\n") == i + 1)
                    for i in range(lines - 1)]  # fmt: skip
            cuts = zip([0, *ends], [*ends, len(logp)], strict=True)
            values[name] = torch.stack([logp[a:b].sum() for a, b in cuts])
        assert [s.f for s in one.steps] == pytest.approx(values["r"].tolist(), abs=1e-3)
        rewards = (values["r"] - values["p"]).tolist()
        assert [s.reward for s in one.steps] == pytest.approx(rewards, abs=1e-3)
        assert one.reward == pytest.approx(sum(rewards), abs=1e-3)


def test_granularities_of_tokens_are_refused(two):
    _, discriminator, policy = two
    for granularity in ("dense", "interval"):
        with pytest.raises(ValueError, match=f"granularity '{granularity}': its spans are tokens"):
            RewardScorer(discriminator, trained(granularity), policy=policy)
    scorer = RewardScorer(discriminator, trained("sparse"), policy=policy)
    (one,) = scorer.score(["q"], TEXTS[:1])
    assert one.reward == pytest.approx(sum(step.reward for step in one.steps), abs=1e-3)
    with pytest.raises(ValueError, match="pair 0: the prompt is token ids"):
        scorer.score([WORDS("q").input_ids], TEXTS[:1])
