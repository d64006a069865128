"""LoRA layers in one pass against PEFT's own, in float64, and left to PEFT where they are more."""

import copy

import peft
import pytest
import torch

from airl_fast.lora import fuse_adapters
from tests.tiny_models import VOCAB, tiny_model

IDS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def model_of(dtype=torch.float32, **options):
    backbone = tiny_model("llama", dtype=dtype)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
    torch.manual_seed(0)
    model = peft.get_peft_model(backbone, lora, adapter_name="one").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # PEFT's B starts at zero
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def states(model):
    return model.get_base_model().model(IDS).last_hidden_state


def gradients(model):
    model.zero_grad()
    states(model).float().square().sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_and_gradients_are_as_exact_as_those_of_peft(dtype, monkeypatch):
    model = model_of(dtype)
    exact = copy.deepcopy(model).double()
    expected, expected_gradients = states(exact), gradients(exact)
    own, own_gradients = states(model), gradients(model)
    ran = []
    run = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *x: ran.append(1) or run(*x))
    fuse_adapters(model)
    found, found_gradients = states(model), gradients(model)
    assert len(ran) == 2 * 7 * 2  # passes, linear layers of a decoder layer, decoder layers
    assert found.dtype == own.dtype == dtype
    assert (found - expected).norm() <= 2 * (own - expected).norm()
    assert found_gradients.keys() == expected_gradients.keys()
    assert all("lora_" in name for name in found_gradients)
    for name, gradient in found_gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        assert error <= 2 * (own_gradients[name] - expected_gradients[name]).norm(), name


def test_a_fresh_adapter_changes_nothing():
    model = model_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        fuse_adapters(model)
        found = states(model)
        with model.disable_adapter():
            assert torch.equal(states(model), found)


def test_each_of_two_adapters_is_its_own():
    model = model_of()
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    fuse_adapters(model)
    found = {}
    with torch.no_grad():
        for name in ("one", "two"):
            model.set_adapter(name)
            found[name] = states(model)
        with model.disable_adapter():
            plain = states(model)
    assert torch.equal(found["two"], plain)  # its B is still zero
    assert not torch.allclose(found["one"], plain)


OPTIONS = {
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "bias": {"lora_bias": True},
    "merged": {},
    "two at once": {},
    "autocast": {},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_other_layers_stay_those_of_peft(kind, monkeypatch):
    model = model_of(**OPTIONS[kind])
    if kind == "merged":
        model.merge_adapter()
    if kind == "two at once":
        model.add_adapter("two", peft.LoraConfig(r=4, target_modules="all-linear"))
        model.base_model.set_adapter(["one", "two"])
    with torch.no_grad(), torch.autocast("cpu", enabled=kind == "autocast"):
        own = states(model)
        fuse_adapters(model)
        monkeypatch.setattr("torch.addmm", None)
        assert torch.equal(states(model), own)
