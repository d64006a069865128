"""Norm, gate and rotation of a decoder's layer in Triton, and whole layers that run on them."""

import copy

import pytest
import torch

from airl_fast import backend
from airl_fast.attention import packed_forward
from airl_fast.fused import fuse
from airl_fast.ops import _layer as layer
from tests.ops.test_layer import check, norm_formula, numbers, rotation_formula
from tests.test_fused import batch_of, counted, model_of, states

pytestmark = pytest.mark.usefixtures("triton_backend")
HALF = [torch.bfloat16, torch.float16]
WIDTHS = [1, 3, 33, 96, 577]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width, device, monkeypatch):
    from airl_fast.kernels import layer as kernels

    monkeypatch.setattr(kernels, "_PARTS", 3)  # programs that take turns at 7 rows
    inputs = [numbers(7, width, scale=3.0), numbers(width, seed=1)]
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    check(lambda x, w: layer.rms_norm(x, w, 1e-5), norm_formula, inputs)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", WIDTHS)
def test_gate(width, device, monkeypatch):
    from airl_fast.kernels import layer as kernels

    monkeypatch.setattr(kernels, "GATE_BLOCK", 128)
    inputs = [numbers(7, width, scale=4.0), numbers(7, width, seed=1)]
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    check(layer.gated, lambda g, u: g * g.sigmoid() * u, inputs)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [2, 6, 32, 66])
def test_rotation(size, device, monkeypatch):
    from airl_fast.kernels import layer as kernels

    monkeypatch.setattr(kernels, "_ROTATED", 40)  # heads of a token in several programs
    angles = numbers(5, size, seed=1).detach().to(device)
    x = numbers(5, 3, size).detach().to(device).requires_grad_()
    check(layer.rotated, rotation_formula, [x], [angles.cos(), angles.sin()])


def test_rotation_of_part_of_a_row(device):
    whole = numbers(5, 3 * 8 + 7).detach().to(device)
    x = whole[:, 2 : 2 + 24].unflatten(1, (3, 8))
    cos, sin = (numbers(5, 8, seed=i).detach().to(device) for i in (1, 2))
    assert torch.equal(layer.rotated(x, cos, sin), layer.rotated(x.contiguous(), cos, sin))
    torch.testing.assert_close(layer.rotated(x, cos, sin), rotation_formula(x, cos, sin))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_rounded_once(dtype, device):
    """Each result within one unit of that of float64; the interpreter cuts where a GPU rounds."""

    def near(found, exact):
        assert found.dtype == dtype
        bound = torch.finfo(dtype).eps * exact.abs() + 1e-3 * torch.finfo(dtype).eps
        assert ((found.double() - exact).abs() <= bound).all()

    x, grad, up = (numbers(6, 48, seed=i).detach().to(device, dtype) for i in range(3))
    weight = numbers(48, seed=4).detach().to(device, dtype)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    exact = norm_formula(*wide)
    leaves = [t.requires_grad_() for t in (x, weight)]
    found = layer.rms_norm(*leaves, 1e-5)
    near(found, exact)
    for got, right in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(exact, wide, grad.double()),
        strict=True,
    ):
        # differences of numbers of the size of 1
        assert (got.double() - right).abs().max() <= 2 * torch.finfo(dtype).eps * right.abs().max()

    near(layer.gated(x, up), torch.nn.functional.silu(x.double()) * up.double())
    angles = numbers(6, 8, seed=5).detach().to(device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    heads = x.detach().unflatten(1, (6, 8))
    turned = rotation_formula(heads.double(), cos.double(), sin.double())
    difference = (layer.rotated(heads, cos, sin).double() - turned).abs()
    assert (difference <= 2 * torch.finfo(dtype).eps * heads.double().abs().max()).all()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_layers_and_their_gradients_are_as_exact_as_those_of_transformers(
    kind, device, monkeypatch
):
    model, batch = model_of(kind).to(device), batch_of(32, first=6).to(device)

    def everything(model):
        model.zero_grad()
        hidden = packed_forward(model.base_model, batch)
        hidden.square().sum().backward()
        named = {
            name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
        }
        return {"states": hidden.detach().double(), **named}

    with backend("reference"):
        expected, own = everything(copy.deepcopy(model).double()), everything(model)
    ran = counted(monkeypatch)
    fuse(model)
    found = everything(model)
    assert len(ran) == 4
    for name, got in found.items():
        error = (got - expected[name]).norm()
        assert error <= 2 * (own[name] - expected[name]).norm() + 1e-6 * expected[name].norm(), name


def test_layers_in_bfloat16(device, monkeypatch):
    model, batch = model_of("llama").to(device, torch.bfloat16), batch_of(32, first=6).to(device)
    exact = states(copy.deepcopy(model).double(), batch)
    own = (states(model, batch).double() - exact).norm()
    ran = counted(monkeypatch)
    fuse(model)
    found = states(model, batch)
    assert len(ran) == 4  # each layer was checked and believed
    assert (found.double() - exact).norm() <= 1.5 * own
    assert torch.equal(states(model, batch), found)


def test_one_large_token_does_not_hide_that_a_layer_has_changed(device, monkeypatch):
    model, batch = model_of("llama").to(device, torch.bfloat16), batch_of(32, first=6).to(device)
    with torch.no_grad():
        model.get_input_embeddings().weight[batch.input_ids[3]] *= 300
    for each in model.base_model.layers:
        activation = each.mlp.act_fn
        activation.forward = lambda x: torch.nn.functional.silu(x) + 0.5
    expected = states(model, batch)
    fuse(model)
    assert torch.equal(states(model, batch), expected)


def test_the_norms_gradient_that_can_be_differentiated_is_right_in_float16(device):
    x = (300 * numbers(4, 16).detach()).to(device, torch.float16).requires_grad_()
    weight = numbers(16, seed=1).detach().to(device, torch.float16).requires_grad_()
    y = layer.rms_norm(x, weight, 1e-5)
    found = torch.autograd.grad(y.float().sin().sum(), [x, weight], create_graph=True)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(norm_formula(*wide).sin().sum(), wide)
    for got, right in zip(found, exact, strict=True):
        assert (got.double() - right).abs().max() <= 5e-3 * right.abs().max()
