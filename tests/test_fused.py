"""Fused decoder layers against the same model in float64, on tiny models of every known kind.

The measure is the error that transformers' own float32 forward makes.
"""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from airl_fast import _C, backend, fused, pack
from airl_fast.attention import enable_packed_attention, packed_forward
from airl_fast.continuing import continued_forward
from airl_fast.fused import fuse
from airl_fast.ops import _cpu_products as products
from airl_fast.packing import Trace

SIZES = {
    "vocab_size": 90,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=11)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=48)),
    "granite": (GraniteForCausalLM, GraniteConfig(**SIZES, residual_multiplier=0.2)),
}


def model_of(kind):
    torch.manual_seed(0)
    made, config = KINDS[kind]
    model = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    enable_packed_attention(model)
    return model


def batch_of(tokens=400, first=130):
    """Two completions of one prompt, of ``first`` and of fewer tokens, and one of another."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(90, (tokens,), generator=generator).tolist()
    cuts = 20, 20 + first, 20 + first + (8 * first) // 13, tokens
    pieces = [tuple(ids[a:b]) for a, b in pairwise(cuts)]
    prompts = tuple(ids[:7]), tuple(ids[:7]), tuple(ids[7:20])
    return pack(
        [
            Trace(prompt=prompt, completion=piece, span_lengths=(len(piece),))
            for prompt, piece in zip(prompts, pieces, strict=True)
        ]
    )


def states(model, batch):
    with torch.no_grad():
        return packed_forward(model.base_model, batch)


def errors(model, batch, passes=2):
    """Root mean squared errors, transformers' own and those of the fused passes."""
    expected = states(copy.deepcopy(model).double(), batch)

    def error(found):
        return (found.double() - expected).square().mean().sqrt().item()

    own = error(states(model, batch))
    fuse(model)
    return own, [error(states(model, batch)) for _ in range(passes)]


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_as_exact_as_those_of_transformers(kind, tiles, monkeypatch):
    if tiles and not _C.products_ready():
        pytest.skip("needs a processor with AMX")
    if not tiles:
        monkeypatch.setattr(products, "LEAST_ROWS", 10**9)
    ran = counted(monkeypatch)
    own, found = errors(model_of(kind), batch_of())
    assert max(found) <= 2 * own
    # Two layers: one pass checks and believes them, the other believes them.
    assert len(ran) == (0 if kind == "granite" else 6)


def counted(monkeypatch):
    ran = []
    monkeypatch.setattr(fused, "_run", lambda *given, run=fused._run: ran.append(1) or run(*given))
    return ran


def test_a_layer_that_has_changed_is_left_as_it_is():
    model = model_of("llama")
    unchanged = states(model, batch_of())
    activation = model.base_model.layers[1].mlp.act_fn
    activation.forward = lambda x: nn.functional.silu(x) + 0.5
    assert not torch.allclose(states(model, batch_of()), unchanged, rtol=0.1)
    own, found = errors(model, batch_of())
    assert max(found) <= 2 * own


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gradients_are_as_exact_as_those_of_transformers(kind, monkeypatch):
    model, batch = model_of(kind), batch_of()

    def gradients(model):
        model.zero_grad()
        packed_forward(model.base_model, batch).square().sum().backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    expected, own = gradients(copy.deepcopy(model).double()), gradients(model)
    ran = counted(monkeypatch)
    fuse(model)
    found = gradients(model)
    assert len(ran) == 4
    assert set(found) == set(expected)
    for name, grad in found.items():
        error = (grad - expected[name]).norm()
        assert error <= 2 * (own[name] - expected[name]).norm() + 1e-7 * expected[name].norm(), name


def test_gradients_of_gradients():
    model, batch = model_of("llama"), batch_of()

    def penalty(model):
        model.zero_grad()
        hidden = packed_forward(model.base_model, batch)
        parameters = dict(model.base_model.named_parameters())
        grads = torch.autograd.grad(hidden.square().mean(), parameters.values(), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return {name: p.grad.double() for name, p in parameters.items()}

    with sdpa_kernel(SDPBackend.MATH):  # the other has no second gradient
        expected = penalty(copy.deepcopy(model).double())
        with backend("reference"):
            own = penalty(model)
    fuse(model)
    for name, grad in penalty(model).items():
        error = (grad - expected[name]).norm()
        assert error <= 3 * (own[name] - expected[name]).norm() + 1e-6 * expected[name].norm()


def test_who_listens_inside_hears_the_models_own_layers(monkeypatch):
    model, batch, heard = model_of("llama"), batch_of(), []
    ran = counted(monkeypatch)
    fuse(model)
    for layer in model.base_model.layers:
        layer.mlp.register_forward_hook(lambda *given: heard.append(1))
    states(model, batch)
    assert (len(ran), len(heard)) == (0, 2)


def test_a_forced_backend_is_not_fused(monkeypatch):
    model, batch = model_of("llama"), batch_of()
    ran = counted(monkeypatch)
    with backend("reference"):
        expected = states(model, batch)
        fuse(model)
        assert torch.equal(states(model, batch), expected)
    assert not ran


def test_texts_that_are_continued():
    model = model_of("llama")
    fuse(model)
    ids = torch.arange(60)
    whole = pack([Trace(prompt=(0,), completion=tuple(range(1, 60)), span_lengths=(59,))])
    expected = states(copy.deepcopy(model).double(), whole)
    with torch.no_grad():
        first, kept = continued_forward(model.base_model, ids[:40])
        second, _ = continued_forward(model.base_model, ids[40:], kept)
    found = torch.cat([first, second]).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_runs_on_its_own_weights():
    model, batch = model_of("llama"), batch_of()
    fuse(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = packed_forward(model.base_model, batch)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(packed_forward(model.base_model, batch), before)
        assert not torch.allclose(packed_forward(other.base_model, batch), before)
    assert set(model.state_dict()) == set(model_of("llama").state_dict())
