"""Fused decoder layers against the same model in float64, on tiny models of every known kind.

The measure is the error that transformers' own float32 forward makes.
"""

import copy

import pytest
import torch
from torch import nn
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

from airl_fast import _C, fused, pack
from airl_fast.attention import enable_packed_attention, packed_forward
from airl_fast.fused import fuse
from airl_fast.packing import Trace

pytestmark = pytest.mark.skipif(not _C.products_ready(), reason="needs a processor with AMX")
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


def batch_of(tokens=400):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(90, (tokens,), generator=generator).tolist()
    first, second = ids[:7], ids[7:20]
    traces = [
        Trace(prompt=tuple(first), completion=tuple(ids[20:150]), span_lengths=(130,)),
        Trace(prompt=tuple(first), completion=tuple(ids[150:230]), span_lengths=(80,)),
        Trace(prompt=tuple(second), completion=tuple(ids[230:]), span_lengths=(tokens - 230,)),
    ]
    return pack(traces)


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


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_as_exact_as_those_of_transformers(kind, monkeypatch):
    ran = []
    monkeypatch.setattr(fused, "_run", lambda *given, run=fused._run: ran.append(1) or run(*given))
    own, found = errors(model_of(kind), batch_of())
    assert max(found) <= 2 * own  # the first pass checks the layers, the second believes them
    assert len(ran) == (0 if kind == "granite" else 4)


def test_a_layer_that_has_changed_is_left_as_it_is():
    model = model_of("llama")
    unchanged = states(model, batch_of())
    activation = model.base_model.layers[1].mlp.act_fn
    activation.forward = lambda x: nn.functional.silu(x) + 0.5
    assert not torch.allclose(states(model, batch_of()), unchanged, rtol=0.1)
    own, found = errors(model, batch_of())
    assert max(found) <= 2 * own


def test_gradients_and_few_tokens_take_the_models_own_layers(monkeypatch):
    model, batch = model_of("llama"), batch_of()

    def gradients(model):
        model.zero_grad()
        packed_forward(model.base_model, batch).square().sum().backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    expected, own = gradients(copy.deepcopy(model).double()), gradients(model)
    fuse(model)
    monkeypatch.setattr(fused, "_run", lambda *given: pytest.fail("ran fused"))
    for name, grad in gradients(model).items():
        error = (grad - expected[name]).norm()
        assert error <= 2 * (own[name] - expected[name]).norm() + 1e-7 * expected[name].norm(), name
    with torch.no_grad():
        short = pack([Trace(prompt=(1,), completion=(2, 3), span_lengths=(2,))])
        packed_forward(model.base_model, short)


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
