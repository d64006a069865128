"""Policy and Discriminator against plain transformers and hand-written formulas."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from airl_fast.discriminator import Discriminator
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.packing import pack
from airl_fast.policy import Policy
from tests import oracle
from tests.model_folders import (
    CONFIGS,
    HEADS,
    TRACES,
    assert_close,
    bits,
    perturb_parameters,
    plain,
    plain_logp,
    write_model,
)
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


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
