"""Norm, gate and rotation of a decoder's layer against float64 formulas, on every vector path."""

import math

import pytest
import torch

from airl_fast.ops import _layer as layer

pytestmark = pytest.mark.usefixtures("path")
WIDTHS = [1, 3, 16, 33, 96, 577]


def numbers(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).requires_grad_()


def norm_formula(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotation_formula(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def check(function, formula, inputs, constants=()):
    """Values, gradients and gradients of gradients, of unlike upstream ones."""

    def everything(f, inputs, constants):
        y = f(*inputs, *constants)
        grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        plain = torch.autograd.grad((y.sin() * grad).sum(), inputs, retain_graph=True)
        first = torch.autograd.grad((y.sin() * grad).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), inputs, allow_unused=True
        )
        return [y, *plain, *first, *second]

    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = everything(formula, wide, [c.double() for c in constants])
    for found, want in zip(everything(function, inputs, constants), expected, strict=True):
        assert (found is None) == (want is None)
        if want is not None:
            # A norm's gradients are differences of numbers of the size of 1.
            assert (found - want).abs().max() <= 1e-5 * max(1.0, want.abs().max())


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width):
    inputs = [numbers(7, width, scale=3.0), numbers(width, seed=1)]
    check(lambda x, w: layer.rms_norm(x, w, 1e-5), norm_formula, inputs)


@pytest.mark.parametrize("width", WIDTHS)
def test_gate(width):
    inputs = [numbers(7, width, scale=4.0), numbers(7, width, seed=1)]
    check(layer.gated, lambda g, u: g * g.sigmoid() * u, inputs)


@pytest.mark.parametrize("size", [2, 6, 32, 66])
def test_rotation(size):
    angles = numbers(5, size, seed=1).detach()
    check(layer.rotated, rotation_formula, [numbers(5, 3, size)], [angles.cos(), angles.sin()])


def test_rotation_of_part_of_a_row():
    whole = numbers(5, 3 * 8 + 7).detach()
    x = whole[:, 2 : 2 + 24].unflatten(1, (3, 8))
    cos, sin = numbers(5, 8, seed=1).detach(), numbers(5, 8, seed=2).detach()
    expected = rotation_formula(x, cos, sin)
    assert torch.equal(layer.rotated(x, cos, sin), layer.rotated(x.contiguous(), cos, sin))
    torch.testing.assert_close(layer.rotated(x, cos, sin), expected)


def test_extremes_of_the_gate():
    g = torch.tensor([[-math.inf, -3e38, -1e4, -100.0, -88.0, 0.0, 88.0, 1e4, 3e38, math.nan]])
    found = layer.gated(g, torch.ones_like(g))[0]
    assert found[-1].isnan()
    torch.testing.assert_close(found[2:-1], torch.nn.functional.silu(g)[0, 2:-1])
    # exp(88) is the largest there is: what is below -88 counts as that in the sigmoid.
    assert found[1].abs() <= 3e38 * 1e-38


def test_rows_do_not_depend_on_the_others_or_on_threads():
    x, weight = numbers(300, 97).detach(), numbers(97, seed=1).detach()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(
                layer.rms_norm(x, weight, 1e-5)[40:42], layer.rms_norm(x[40:42], weight, 1e-5)
            )
            assert torch.equal(layer.gated(x, x)[40:42], layer.gated(x[40:42], x[40:42]))
    finally:
        torch.set_num_threads(threads)


def test_what_the_kernels_take():
    x = torch.ones(2)
    assert layer.serves(x, torch.nn.Parameter(x))
    assert not layer.serves(x, x.double())
    assert not layer.serves(x.to("meta"))
