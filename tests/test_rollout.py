"""Sampling against the packed path, plain transformers and the distribution it must follow."""

import json

import pytest
import torch
from transformers import GenerationConfig

import airl_fast.rollout
from airl_fast.discriminator import Discriminator
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.packing import Trace
from airl_fast.passes import action_logp
from airl_fast.policy import Policy
from airl_fast.rollout import sample
from tests.tiny_models import TINY_MODELS, tiny_model, tiny_tokenizer

PROMPTS = [(1, 5, 9, 4), (7,), (1, 8, 8, 3, 20, 11), (7,)]


def make_policy(name="llama", seed=0, pad=None, scale=1.0, **overrides):
    """A tiny random policy; ``scale`` below 1 flattens its distribution."""
    model = tiny_model(name, seed=seed, **overrides).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    tokenizer = tiny_tokenizer()
    if pad is not None:
        tokenizer.pad_token = pad
    return LanguageModel(model, tokenizer, Origin(model="tiny"))


@pytest.fixture(scope="module")
def policy():
    return make_policy(scale=0.3)


def draw(policy, prompts=PROMPTS, **options):
    settings = {"group_size": 3, "max_new_tokens": 12, "seed": 0} | options
    return sample(policy, prompts, **settings)


def packed_logp(policy, rollouts, temperature=1.0):
    traces = [
        Trace(prompt=r.prompt, completion=r.completion, span_lengths=(len(r.completion),))
        for r in rollouts
    ]
    return action_logp(policy, traces, 4096, temperature)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_and_packed_log_probs_agree(name, temperature):
    policy = make_policy(name)
    rollouts = draw(policy, temperature=temperature)
    assert len(rollouts) == 3 * len(PROMPTS)
    assert [r.prompt for r in rollouts] == [p for p in PROMPTS for _ in range(3)]
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts, temperature), strict=True):
        assert len(rollout.logp) == len(rollout.completion) >= 1
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_long_completions_of_prompts_that_rows_share(name, backend):
    """Past the tokens that rows first have room for, and while others end beside them."""
    policy = make_policy(name, scale=0.1)
    prompts = [*PROMPTS, tuple(range(3, 60))]
    with airl_fast.backend(backend):
        rollouts = draw(policy, prompts, max_new_tokens=150, group_size=4)
    lengths = [len(r.completion) for r in rollouts]
    assert min(lengths) < 20
    assert max(lengths) > 128
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


def test_bfloat16_is_sampled_and_scored_alike():
    policy = make_policy(scale=0.3)
    policy.model.to(torch.bfloat16)
    rollouts = draw(policy, max_new_tokens=30)
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        # logits are rounded to 8 bits where they are sampled
        torch.testing.assert_close(torch.tensor(rollout.logp), logp.cpu(), atol=0.1, rtol=0)


def test_each_adapter_of_a_backbone_is_sampled_as_itself(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = Policy.from_pretrained(tmp_path, lora_rank=2)
    discriminator = Discriminator.create(policy, trunk="shared", lora_rank=2)
    with torch.no_grad():
        for i, p in enumerate([*policy.trainable().values(), *discriminator.trainable().values()]):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    for model in (policy, discriminator.body):
        rollouts = draw(model)
        for rollout, logp in zip(rollouts, packed_logp(model, rollouts), strict=True):
            torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


def test_the_seed_decides_and_the_global_state_does_not(policy):
    torch.manual_seed(1)
    first = draw(policy)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert draw(policy) == first
    assert draw(policy, seed=1) != first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # sampling leaves it as it was


def test_members_of_a_group_differ(policy):
    rollouts = draw(policy, group_size=4)
    assert len({r.completion for r in rollouts[:4]}) > 1


def test_batch_size_bounds_a_batch_and_keeps_the_order(policy):
    rollouts = draw(policy, batch_size=3)
    assert [r.prompt for r in rollouts] == [p for p in PROMPTS for _ in range(3)]
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


def plain_greedy(model, prompt, count, ends):
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_temperature_0_is_greedy(name):
    policy = make_policy(name)
    reference = tiny_model(name, attn_implementation="eager").eval()
    rollouts = draw(policy, group_size=1, temperature=0)
    expected = [plain_greedy(reference, prompt, 12, {2}) for prompt in PROMPTS]
    assert [r.completion for r in rollouts] == expected
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


# Where a completion ends


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_finish_reasons_end_and_length(pad):
    policy = make_policy(scale=0.05, pad=pad)
    rollouts = draw(policy, group_size=40, max_new_tokens=20)
    assert {r.finish for r in rollouts} == {"end", "length"}
    for rollout in rollouts:
        assert 2 not in rollout.completion[:-1]
        if rollout.finish == "end":
            assert rollout.completion[-1] == 2
            assert "<eos>" not in rollout.text
        else:
            assert len(rollout.completion) == 20
            assert rollout.completion[-1] != 2


@pytest.mark.parametrize("pad", [None, "<eos>"])
@pytest.mark.parametrize("stop", [["5"], ["12", "3", "a+"], ["\n"]])
def test_a_stop_string_ends_a_completion_where_it_appears(pad, stop):
    policy = make_policy(scale=0.02, pad=pad)
    prompts = [tuple(policy.tokenizer("7+5=").input_ids), tuple(policy.tokenizer("1").input_ids)]
    rollouts = draw(policy, prompts, group_size=60, max_new_tokens=24, stop=stop)
    assert {r.finish for r in rollouts} == {"stop", "end", "length"}
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        # Every token was drawn, none is padding: its log-prob is that of the packed path.
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)
        before = policy.tokenizer.decode(rollout.completion[:-1], skip_special_tokens=True)
        assert not any(s in before for s in stop)
        found = any(s in rollout.text for s in stop)
        assert found == (rollout.finish == "stop")
        if rollout.finish == "end":
            assert rollout.completion[-1] == 2
        if rollout.finish == "length":
            assert len(rollout.completion) == 24


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_stop_string_may_not_begin_in_the_prompt(pad):
    # The prompt ends with the first half of the stop string.
    policy = make_policy(scale=0.02, pad=pad)
    tokenizer = policy.tokenizer
    prompts = [tuple(tokenizer(text).input_ids) for text in ("1=2", "3=")]
    rollouts = draw(policy, prompts, group_size=300, max_new_tokens=6, stop=["=1", "23"])
    for members, token in ((rollouts[:300], "3"), (rollouts[300:], "1")):
        # What follows is drawn among 61 tokens: it is not padding.
        begun = [r.completion for r in members if r.text[:1] == token]
        assert len(begun) >= 2
        assert len({completion[1:] for completion in begun}) >= 2
    for rollout in rollouts:
        if rollout.finish == "stop":
            assert "=1" in rollout.text or "23" in rollout.text
        elif rollout.finish == "end":
            assert rollout.completion[-1] == 2
        else:
            assert len(rollout.completion) == 6
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_completion_does_not_depend_on_what_is_sampled_beside_it(policy, temperature):
    prompts = [*PROMPTS, (1, 4), (9, 9, 9, 12, 30, 31, 7, 8)]
    together = draw(policy, prompts, temperature=temperature)
    in_threes = draw(policy, prompts, temperature=temperature, batch_size=3)
    first = draw(policy, prompts[:2], temperature=temperature)
    longer = draw(policy, prompts, temperature=temperature, max_new_tokens=16)
    completions = [r.completion for r in together]
    assert [r.completion for r in in_threes] == completions
    assert [r.completion for r in first] == completions[:6]
    assert [r.completion[:12] for r in longer] == completions
    assert len(set(completions)) > 10
    equal_prompts = [completions[i * 3 : i * 3 + 3] for i in (1, 3)]
    assert equal_prompts[0] != equal_prompts[1]


@pytest.mark.parametrize("stop", [(), ("12", "3")])
def test_rows_that_are_read_late_end_where_they_end(policy, stop, monkeypatch):
    options = {"group_size": 40, "max_new_tokens": 50, "stop": stop}
    expected = draw(policy, **options)
    assert len({len(r.completion) for r in expected}) > 10
    monkeypatch.setitem(airl_fast.rollout._UNREAD, "cpu", 7)
    assert draw(policy, **options) == expected


def test_a_policy_that_is_not_finite_is_not_sampled_in_silence():
    policy = make_policy()
    with torch.no_grad():
        policy.head.weight[5, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="log-probs of sampled tokens are not finite"):
        draw(policy)


# The distribution


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax_at_the_temperature(temperature):
    policy = make_policy(seed=4, vocab_size=61, scale=0.25)
    prompt, count = (1, 5, 9), 20000
    reference = tiny_model("llama", seed=4).eval()
    with torch.no_grad():
        reference.get_output_embeddings().weight.mul_(0.25)
        logits = reference(torch.tensor([prompt])).logits[0, -1].double()
    expected = count * (logits / temperature).softmax(0)
    rollouts = draw(
        policy,
        [prompt],
        group_size=count,
        max_new_tokens=1,
        temperature=temperature,
        batch_size=count,
    )
    observed = torch.bincount(torch.tensor([r.completion[0] for r in rollouts]), minlength=61)
    frequent = expected >= 5
    pooled = [torch.cat([x[frequent], x[~frequent].sum()[None]]) for x in (observed, expected)]
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1].clamp(min=1e-9)).sum().item()
    freedom = int(frequent.sum())
    assert freedom >= 20
    # The mean of chi-square is its degrees of freedom, the deviation sqrt(2 df): five of them.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


SETTINGS = {
    "do_sample": True,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.5,
    "temperature": 0.1,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [5, 6],
    "min_new_tokens": 8,
    "num_return_sequences": 2,
    "bad_words_ids": [[7], [8]],
    "sequence_bias": [[[9], 8.0]],
}


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_the_models_own_generation_settings_change_nothing(temperature, tmp_path):
    options = {"seed": 5, "group_size": 4, "temperature": temperature}
    policy = make_policy(scale=0.3)
    expected = draw(policy, **options)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SETTINGS}))
    other = Policy.from_pretrained(tmp_path)
    assert other.model.generation_config.repetition_penalty == 3.0
    assert draw(other, **options) == expected
    assert other.model.generation_config.repetition_penalty == 3.0


def test_every_end_of_text_token_of_the_model_ends_a_completion():
    policy = make_policy(scale=0.02)
    policy.model.generation_config = GenerationConfig(eos_token_id=[2, 30])
    rollouts = draw(policy, group_size=60)
    assert {r.completion[-1] for r in rollouts if r.finish == "end"} == {2, 30}
    assert not any({2, 30} & set(r.completion[:-1]) for r in rollouts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [(1, 2), ()]}, "prompt 1 is empty"),
        ({"temperature": -1.0}, "temperature must be at least 0, received -1"),
        ({"max_new_tokens": 251}, r"prompt 2 has 6 tokens: with max_new_tokens=251 .* of 256"),
    ],
)
def test_what_cannot_be_sampled_is_refused(policy, options, message):
    with pytest.raises(ValueError, match=message):
        draw(policy, **options)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(policy, default):
    expected = draw(policy)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert draw(policy) == expected
        packed = packed_logp(policy, expected)
    finally:
        torch.set_default_dtype(before)
    for rollout, logp in zip(expected, packed, strict=True):
        assert logp.dtype == torch.float32
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["diffllama", "shared layer", "shared attention"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_that_a_pass_calls_more_than_once(name, backend):
    model = tiny_model(name if name == "diffllama" else "llama").eval()
    layers = model.model.layers
    if name == "shared layer":
        layers[1] = layers[0]
    if name == "shared attention":
        layers[1].self_attn = layers[0].self_attn
    policy = LanguageModel(model, tiny_tokenizer(), Origin(model="tiny"))
    with airl_fast.backend(backend):
        rollouts = draw(policy)
    for rollout, logp in zip(rollouts, packed_logp(policy, rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp, atol=2e-4, rtol=1e-4)


def test_a_model_whose_passes_differ_is_refused():
    policy = make_policy()
    layers, calls = policy.model.model.layers, []

    def once_more(module, args, kwargs, output):
        calls.append(module)
        return type(layers[0]).forward(layers[0], output, **kwargs) if len(calls) > 1 else output

    layers[1].register_forward_hook(once_more, with_kwargs=True)
    with pytest.raises(ValueError, match="does not attend as often"):
        draw(policy)


def test_keys_are_kept_whatever_rebuilds_the_arguments_of_a_layer(policy):
    from torch.utils._pytree import tree_map

    expected = draw(policy)

    def rebuilt(module, args, kwargs):
        return args, tree_map(lambda x: x, kwargs)

    hooks = [
        layer.register_forward_pre_hook(rebuilt, with_kwargs=True)
        for layer in policy.model.model.layers
    ]
    found = draw(policy)
    for hook in hooks:
        hook.remove()
    assert found == expected


def test_a_rotation_that_depends_on_the_longest_text_is_refused_beforehand():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 20, "factor": 2.0,
    }  # fmt: skip
    policy = make_policy(rope_parameters=rope)
    assert policy.context == 20
    assert len(draw(policy, max_new_tokens=14)) == 12
    with pytest.raises(ValueError, match="prompt 2 has 6 tokens: with max_new_tokens=15"):
        draw(policy, max_new_tokens=15)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens(policy, tokens):
    rollouts = draw(policy, max_new_tokens=tokens, group_size=1)
    assert [r.prompt for r in rollouts] == PROMPTS
    assert all(1 <= len(r.completion) <= tokens for r in rollouts)
    with torch.no_grad():
        policy_that_ends = make_policy(scale=0.0)
        bias = torch.nn.Parameter(torch.zeros(61))
        bias[2] = 1e4
        policy_that_ends.causal_lm.get_output_embeddings().bias = bias
    rollouts = draw(policy_that_ends, max_new_tokens=9)
    assert {(r.completion, r.finish, r.logp) for r in rollouts} == {((2,), "end", (0.0,))}
