"""Policy and Discriminator against plain transformers and hand-written formulas."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
)

from airl_fast.language_model import LanguageModel, Origin
from airl_fast.models import Discriminator, Policy
from airl_fast.packing import Source, Trace, pack
from tests import oracle
from tests.tiny_models import VOCAB, tiny_config, tiny_model, tiny_tokenizer

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: tiny_config("qwen2"),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: tiny_config("gemma2", final_logit_softcapping=3.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.4),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi": lambda: PhiConfig(**SIZES, partial_rotary_factor=0.5),
}


def write_model(folder: Path, name: str = "llama", seed: int = 0) -> Path:
    """A tiny model of random weights with its tokenizer, as a folder of safetensors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


def make_traces() -> list[Trace]:
    """Two prompts; the first is shared by three completions. Spans of several lengths."""
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist())

    first, second = draw(5), draw(3)
    return [
        Trace(prompt=first, completion=draw(6), span_lengths=(2, 1, 3), group=0),
        Trace(prompt=first, completion=draw(4), span_lengths=(4,), group=0, source=Source.EXPERT),
        Trace(prompt=second, completion=draw(3), span_lengths=(1, 1, 1), group=1),
        Trace(prompt=first, completion=draw(1), span_lengths=(1,), group=0),
    ]


TRACES = make_traces()


def plain(model, trace):
    """Logits that predict each action, and the hidden state at each action, run alone."""
    model.eval()
    ids = torch.tensor([[*trace.prompt, *trace.completion]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
    start = len(trace.prompt)
    return out.logits[0, start - 1 : -1], out.hidden_states[-1][0, start:]


def plain_logp(model, trace, temperature=1.0):
    logits = plain(model, trace)[0].double() / temperature
    return logits.log_softmax(-1)[range(len(trace.completion)), list(trace.completion)]


def perturb_parameters(parameters, seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += std * torch.randn(parameter.shape, generator=generator)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(found, expected, atol=1e-4):
    expected = torch.as_tensor(expected).to(found.dtype)
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# The policy's head


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprob_is_that_of_transformers_own_logits(name, temperature, tmp_path):
    policy = Policy.from_pretrained(write_model(tmp_path, name))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    batch = pack(TRACES)
    logp, entropy = policy.logprob(policy.hidden(batch), batch, temperature)
    assert_close(logp, torch.cat([plain_logp(reference, t, temperature) for t in TRACES]))
    logits = torch.cat([plain(reference, t)[0] for t in TRACES]).double() / temperature
    assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


class Halved(LlamaForCausalLM):
    """A head that does what no configuration says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_a_head_that_transforms_its_logits_is_refused():
    model = Halved(LlamaConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match="Halved does something to its logits"):
        LanguageModel(model, tiny_tokenizer(), Origin(model="halved"))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["adapted", "replaced"],
)
def test_a_head_with_an_adapter_is_refused(config):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, **config), adapter_name="policy")
    with pytest.raises(ValueError, match=r"head is a .*expected a plain Linear.*merge it"):
        LanguageModel(model, tiny_tokenizer(), Origin(model="adapted"), "policy")


# What is trained


def test_full_weights_train_everything(folder):
    policy = Policy.from_pretrained(folder)
    assert set(policy.trainable()) == {name for name, _ in policy.model.named_parameters()}


def test_tied_weights_are_listed_once(tmp_path):
    policy = Policy.from_pretrained(write_model(tmp_path, "tied"))
    addresses = [p.data_ptr() for p in policy.trainable().values()]
    assert len(addresses) == len(set(addresses))
    assert policy.head.weight.data_ptr() in addresses


def test_lora_trains_its_adapter_and_leaves_the_head_alone(folder):
    policy = Policy.from_pretrained(folder, lora_rank=3)
    names = set(policy.trainable())
    assert names
    assert all(".lora_A.policy." in n or ".lora_B.policy." in n for n in names)
    assert not any("lm_head" in n for n in names)
    # Seven linear layers in each of the two blocks, two matrices each.
    assert len(names) == 2 * 7 * 2
    frozen = [n for n, p in policy.model.named_parameters() if not p.requires_grad]
    assert set(frozen) | names == {n for n, _ in policy.model.named_parameters()}


def test_a_fresh_adapter_changes_nothing(folder):
    batch = pack(TRACES)
    plain_policy = Policy.from_pretrained(folder)
    adapted = Policy.from_pretrained(folder, lora_rank=3)
    torch.testing.assert_close(adapted.hidden(batch), plain_policy.hidden(batch))


def shared(folder, **options):
    policy = Policy.from_pretrained(folder, lora_rank=2)
    discriminator = Discriminator.create(
        policy, trunk="shared", lora_rank=3, lora_alpha=8, **options
    )
    return policy, discriminator


@pytest.mark.parametrize("head", ["lm", "score"])
def test_a_shared_backbone_sends_gradients_to_one_adapter_only(folder, head):
    policy, discriminator = shared(folder, head=head)
    perturb_parameters(policy.trainable().values())
    perturb_parameters(discriminator.trainable().values())
    batch = pack(TRACES)
    body = [n for n in discriminator.trainable() if not n.startswith("head.")]
    assert len(body) == len(policy.trainable())
    assert all(".discriminator." in n for n in body)

    discriminator.f(batch).sum().backward()
    assert all(p.grad is None for p in policy.trainable().values())
    assert all(p.grad.abs().sum() > 0 for p in discriminator.trainable().values())
    discriminator.zero_grad()

    # The backward pass runs after the other adapter was used: it must not follow it.
    logp, _ = policy.logprob(policy.hidden(batch), batch)
    with torch.no_grad():
        discriminator.f(batch)
    logp.sum().backward()
    assert all(p.grad is None for p in discriminator.trainable().values())
    assert all(p.grad.abs().sum() > 0 for p in policy.trainable().values())
    base = [p for n, p in policy.model.named_parameters() if ".lora_" not in n]
    assert all(p.grad is None and not p.requires_grad for p in base)


@pytest.mark.parametrize("mover", ["policy", "discriminator"])
def test_updating_one_adapter_leaves_the_other_and_the_base_alone(folder, mover):
    policy, discriminator = shared(folder)
    perturb_parameters(policy.trainable().values())
    batch = pack(TRACES)
    before = bits(policy.model)
    moved = {"policy": policy, "discriminator": discriminator}[mover].trainable()
    optimiser = torch.optim.AdamW(moved.values(), lr=1e-2)
    for _ in range(2):
        values = {
            "policy": lambda: policy.logprob(policy.hidden(batch), batch)[0],
            "discriminator": lambda: discriminator.f(batch),
        }[mover]()
        optimiser.zero_grad()
        values.square().mean().backward()
        optimiser.step()
    after = bits(policy.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n.removeprefix("body.") for n in moved if not n.startswith("head.")}


def test_the_two_adapters_of_a_backbone_answer_for_themselves(folder):
    policy, discriminator = shared(folder)
    batch = pack(TRACES)
    alone = policy.hidden(batch)
    perturb_parameters(discriminator.trainable().values(), std=0.3)
    assert torch.equal(policy.hidden(batch), alone)
    assert not torch.allclose(discriminator.body.hidden(batch), alone)
    assert torch.equal(policy.hidden(batch), alone)


def test_a_shared_backbone_needs_an_adapter_on_the_policy(folder):
    policy = Policy.from_pretrained(folder)
    with pytest.raises(ValueError, match="shared backbone needs LoRA on both"):
        Discriminator.create(policy, trunk="shared", lora_rank=2)


def test_the_policys_trunk_gets_no_gradient_from_f(folder):
    policy = Policy.from_pretrained(folder)
    discriminator = Discriminator.create(policy, head="score", trunk="policy")
    assert set(discriminator.trainable()) == {"head.weight", "head.bias"}
    batch = pack(TRACES)
    discriminator.f(batch, policy.hidden(batch)).square().sum().backward()
    perturb_parameters(discriminator.trainable().values())
    discriminator.f(batch, policy.hidden(batch)).square().sum().backward()
    assert all(p.grad is None for p in policy.trainable().values())
    assert discriminator.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="pass policy_hidden"):
        discriminator.f(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "lm", "trunk": "policy"}, "use head='score'"),
        ({"head": "lm", "shaping_gamma": 0.9}, "shaping needs"),
        ({"trunk": "shared"}, "received lora_rank=0: give it a rank of 1 or more"),
        ({"trunk": "shared", "lora_rank": 2, "model": "other"}, "leave it out, or use trunk='own'"),
    ],
)
def test_contradictory_parts_are_refused(folder, options, message):
    policy = Policy.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        Discriminator.create(policy, **options)


def test_another_tokenizer_is_refused(folder, tmp_path):
    policy = Policy.from_pretrained(folder)
    write_model(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        Discriminator.create(policy, model=str(tmp_path))


# f and the reward


VARIANTS = {
    "full": ({}, {}),
    "lora": ({"lora_rank": 2}, {"lora_rank": 2}),
    "shared": ({"lora_rank": 2}, {"trunk": "shared", "lora_rank": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lm_head_starts_as_a_copy_of_the_policy(folder, variant):
    of_policy, of_discriminator = VARIANTS[variant]
    policy = Policy.from_pretrained(folder, **of_policy)
    discriminator = Discriminator.create(policy, **of_discriminator)
    assert discriminator.score(pack(TRACES), policy).reward.abs().max() == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_policy_is_what_the_copy_starts_from(folder, variant):
    of_policy, of_discriminator = VARIANTS[variant]
    policy = Policy.from_pretrained(folder, **of_policy)
    perturb_parameters(policy.trainable().values())
    discriminator = Discriminator.create(policy, **of_discriminator)
    assert discriminator.score(pack(TRACES), policy).reward.abs().max() == 0.0


def test_copies_between_unlike_models_are_refused(folder):
    policy = Policy.from_pretrained(folder, lora_rank=2)
    perturb_parameters(policy.trainable().values())
    with pytest.raises(ValueError, match="train different parameters"):
        Discriminator.create(policy, lora_rank=3)
    with pytest.raises(ValueError, match="train different parameters"):
        Discriminator.create(policy, lora_rank=2, lora_alpha=5)
    with pytest.raises(ValueError, match="train different parameters"):
        Discriminator.create(policy)


@pytest.mark.parametrize("span_logp", ["sum", "mean"])
def test_the_lm_head_is_kappa_log_q_plus_offset(folder, tmp_path, span_logp):
    policy = Policy.from_pretrained(folder)
    other = write_model(tmp_path, seed=5)
    discriminator = Discriminator.create(
        policy, model=str(other), kappa=0.7, offset=-0.3, span_logp=span_logp
    )
    reference = AutoModelForCausalLM.from_pretrained(other)
    expected = []
    for trace in TRACES:
        per_action = 0.7 * plain_logp(reference, trace) - 0.3
        for part in per_action.split(list(trace.span_lengths)):
            expected.append(part.sum() if span_logp == "sum" else part.mean())
    assert_close(discriminator.f(pack(TRACES)), torch.stack(expected))


@pytest.mark.parametrize("gamma", [None, 0.0, 0.9, 1.0])
def test_the_score_head_is_read_at_the_last_action(folder, gamma):
    policy = Policy.from_pretrained(folder)
    discriminator = Discriminator.create(policy, head="score", shaping_gamma=gamma)
    assert discriminator.f(pack(TRACES)).abs().max() == 0.0
    perturb_parameters([discriminator.weight, discriminator.bias], std=0.5)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    rows, bias = discriminator.weight.detach().double(), discriminator.bias.detach().double()
    expected = []
    for trace in TRACES:
        states = plain(reference, trace)[1].double()
        last, before = -1, 0.0
        for i, length in enumerate(trace.span_lengths):
            last += length
            f = states[last] @ rows[0] + bias[0]
            if gamma is not None:
                here = states[last] @ rows[1] + bias[1]
                terminal = i == len(trace.span_lengths) - 1
                f = f + gamma * (0.0 if terminal else here) - before
                before = here
            expected.append(f)
    assert_close(discriminator.f(pack(TRACES)), torch.stack(expected))


HEADS = {
    "lm": {"head": "lm", "kappa": 0.8, "offset": 0.2},
    "lm-mean": {"head": "lm", "span_logp": "mean"},
    "score": {"head": "score"},
    "shaped": {"head": "score", "shaping_gamma": 0.9},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("form", ["airl", "logit"])
def test_the_fused_score_agrees_with_f_and_logprob(head, name, form, tmp_path):
    policy = Policy.from_pretrained(write_model(tmp_path, name))
    discriminator = Discriminator.create(policy, **HEADS[head])
    perturb_parameters(discriminator.trainable().values())
    batch, temperature = pack(TRACES), 0.7
    score = discriminator.score(batch, policy, form=form, temperature=temperature)
    logp, entropy = policy.logprob(policy.hidden(batch), batch, temperature)
    assert_close(score.logp, logp.detach())
    assert_close(score.entropy, entropy.detach())
    f = discriminator.f(batch).detach()
    assert_close(score.f, f)
    spans = oracle.span_logp(logp.detach(), batch.cu_spans, discriminator.span_logp)
    assert_close(score.reward, f - spans if form == "airl" else f, atol=3e-4)


def test_the_fused_score_reads_the_policys_trunk(folder):
    policy = Policy.from_pretrained(folder)
    discriminator = Discriminator.create(policy, head="score", trunk="policy", shaping_gamma=1.0)
    perturb_parameters(discriminator.trainable().values())
    batch = pack(TRACES)
    f = discriminator.f(batch, policy.hidden(batch)).detach()
    assert_close(discriminator.score(batch, policy).f, f)


# To disk and back


@pytest.mark.parametrize(("saved", "asked"), [(0, 0), (0, 4), (4, 0), (4, 4)])
def test_a_saved_policy_has_its_dtype_or_the_one_asked_for(folder, tmp_path, saved, asked):
    Policy.from_pretrained(folder, lora_rank=saved, dtype=torch.bfloat16).save(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        policy = Policy.from_pretrained(tmp_path, dtype=dtype, lora_rank=asked)
        assert policy.head.weight.dtype == expected


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_comes_back_with_the_same_bits(folder, tmp_path, rank, dtype):
    policy = Policy.from_pretrained(folder, lora_rank=rank, dtype=dtype)
    perturb_parameters(policy.trainable().values())
    policy.save(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    back = Policy.from_pretrained(tmp_path)
    assert_same(policy, back)
    hidden = back.hidden(pack(TRACES))
    assert hidden.dtype == dtype
    assert torch.equal(policy.hidden(pack(TRACES)), hidden)
    assert back.tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def assert_same(first, second):
    one, two = first.trainable(), second.trainable()
    assert list(one) == list(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.equal(one[name], two[name]), name


def test_transformers_and_peft_read_a_saved_policy(folder, tmp_path):
    from peft import PeftModel

    policy = Policy.from_pretrained(folder)
    perturb_parameters(policy.trainable().values())
    policy.save(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    batch = pack(TRACES)
    logp = policy.logprob(policy.hidden(batch), batch)[0].detach()
    assert_close(logp, torch.cat([plain_logp(model, t) for t in TRACES]))

    policy = Policy.from_pretrained(folder, lora_rank=2)
    perturb_parameters(policy.trainable().values())
    policy.save(tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "lora")
    logp = policy.logprob(policy.hidden(batch), batch)[0].detach()
    assert_close(logp, torch.cat([plain_logp(model, t) for t in TRACES]))


BODIES = {
    "own": {},
    "own-lora": {"lora_rank": 2},
    "shared": {"trunk": "shared", "lora_rank": 3, "lora_alpha": 5},
    "policy": {"trunk": "policy"},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("policy_rank", [0, 2])
def test_a_discriminator_comes_back_with_the_same_bits(folder, tmp_path, head, body, policy_rank):
    if (body == "policy" and "lm" in head) or (body == "shared" and not policy_rank):
        pytest.skip("refused")
    policy = Policy.from_pretrained(folder, lora_rank=policy_rank)
    discriminator = Discriminator.create(policy, **HEADS[head], **BODIES[body])
    perturb_parameters(discriminator.trainable().values())
    discriminator.save(tmp_path, training={"granularity": "step"})
    back = Discriminator.from_pretrained(tmp_path)
    assert_same(discriminator, back)
    batch = pack(TRACES)
    hidden = policy.hidden(batch).detach()
    assert torch.equal(discriminator.f(batch, hidden), back.f(batch, hidden))
    assert back.span_logp == discriminator.span_logp
    assert back.shaping_gamma == discriminator.shaping_gamma
    assert json.loads((tmp_path / "airl_fast.json").read_text())["training"] == {
        "granularity": "step"
    }


def test_a_bfloat16_adapter_over_a_bfloat16_base_comes_back(folder, tmp_path):
    policy = Policy.from_pretrained(folder, lora_rank=2, dtype=torch.bfloat16)
    discriminator = Discriminator.create(policy, trunk="shared", lora_rank=2)
    perturb_parameters(discriminator.trainable().values())
    discriminator.save(tmp_path)
    back = Discriminator.from_pretrained(tmp_path)
    assert torch.equal(discriminator.f(pack(TRACES)), back.f(pack(TRACES)))


def test_the_wrong_folder_is_named(folder, tmp_path):
    Policy.from_pretrained(folder).save(tmp_path)
    with pytest.raises(ValueError, match="holds a 'policy', expected a 'discriminator'"):
        Discriminator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no airl_fast\.json"):
        Discriminator.from_pretrained(folder)


def test_a_saved_policy_of_full_weights_takes_a_fresh_adapter(folder, tmp_path):
    policy = Policy.from_pretrained(folder)
    perturb_parameters(policy.trainable().values())
    policy.save(tmp_path / "full")
    adapted = Policy.from_pretrained(tmp_path / "full", lora_rank=2)
    assert all(".lora_" in name for name in adapted.trainable())
    perturb_parameters(adapted.trainable().values())
    adapted.save(tmp_path / "lora")
    back = Policy.from_pretrained(tmp_path / "lora")
    assert torch.equal(adapted.hidden(pack(TRACES)), back.hidden(pack(TRACES)))
    assert_same(Policy.from_pretrained(tmp_path / "lora", lora_rank=2), back)
    with pytest.raises(ValueError, match=r"adapter of rank 2.*lora_rank=3"):
        Policy.from_pretrained(tmp_path / "lora", lora_rank=3)
