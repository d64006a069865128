"""Policies and discriminators to disk and back, and to transformers and PEFT."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from airl_fast.discriminator import Discriminator
from airl_fast.packing import pack
from airl_fast.policy import Policy
from tests.model_folders import (
    HEADS,
    TRACES,
    assert_close,
    perturb_parameters,
    plain_logp,
    write_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


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
