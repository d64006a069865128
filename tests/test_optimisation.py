"""The schedule by its formula, the update against torch's AdamW, clipping, and restoring."""

import math

import pytest
import torch
from torch import nn

from airl_fast.optimisation import Optimiser

OPTIONS = {"weight_decay": 0.1, "betas": (0.9, 0.98), "clip_norm": 1.0}


def parameters(seed=0, shapes=((3, 2), (4,))):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{i}": nn.Parameter(torch.randn(s, generator=generator)) for i, s in enumerate(shapes)
    }


def give_gradients(named, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in named.values():
        p.grad = size * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_rate_warms_up_and_falls_by_a_cosine(warmup, final):
    named = parameters()
    optimiser = Optimiser(
        named, learning_rate=0.5, warmup=warmup, updates=20, final_fraction=final, **OPTIONS
    )
    for i in range(25):
        if i < warmup:
            expected = (i + 1) / warmup
        else:
            turn = min((i - warmup) / (20 - warmup), 1.0)
            expected = final + (1 - final) * (1 + math.cos(math.pi * turn)) / 2
        assert optimiser.rate_factor() == pytest.approx(expected)
        give_gradients(named, i)
        optimiser.step()
        assert optimiser.adamw.param_groups[0]["lr"] == pytest.approx(0.5 * expected)


def test_the_rate_is_constant_without_an_end():
    named = parameters()
    optimiser = Optimiser(named, learning_rate=0.5, **OPTIONS)
    for i in range(5):
        give_gradients(named, i)
        optimiser.step()
        assert optimiser.adamw.param_groups[0]["lr"] == 0.5


def test_a_warm_up_longer_than_the_run_only_rises():
    named = parameters()
    optimiser = Optimiser(named, learning_rate=1.0, warmup=10, updates=3, **OPTIONS)
    factors = []
    for i in range(3):
        factors.append(optimiser.rate_factor())
        give_gradients(named, i)
        optimiser.step()
    assert factors == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_an_update_is_torchs_adamw_on_the_clipped_gradient(size):
    named, twin = parameters(), parameters()
    optimiser = Optimiser(named, learning_rate=0.1, **OPTIONS)
    reference = torch.optim.AdamW(twin.values(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.1)
    for i in range(4):
        give_gradients(named, i, size)
        give_gradients(twin, i, size)
        whole = torch.cat([p.grad.flatten() for p in twin.values()]).norm().item()
        for p in twin.values():
            p.grad *= min(1.0, 1.0 / whole)
        reference.step()
        assert optimiser.step() == pytest.approx(whole, rel=1e-5)
        assert all(p.grad is None for p in named.values())
        for name in named:
            torch.testing.assert_close(named[name], twin[name])


@pytest.mark.parametrize("with_body", [True, False])
def test_the_head_has_a_rate_of_its_own_and_no_decay(with_body):
    body = parameters() if with_body else {}
    head = {"kappa": nn.Parameter(torch.tensor(2.0))}
    optimiser = Optimiser(body, head=head, learning_rate=0.1, head_learning_rate=0.3, **OPTIONS)
    before = {name: p.detach().clone() for name, p in body.items()}
    for p in (*body.values(), *head.values()):
        p.grad = torch.zeros_like(p)
    optimiser.step()
    assert head["kappa"].item() == 2.0  # no gradient, no decay
    for name, p in body.items():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.1))
    head["kappa"].grad = torch.tensor(0.5)
    moments = torch.optim.AdamW([twin := nn.Parameter(torch.tensor(2.0))], lr=0.3, weight_decay=0.0)
    moments.param_groups[0]["betas"] = (0.9, 0.98)
    for gradient in (0.0, 0.5):
        twin.grad = torch.tensor(gradient)
        moments.step()
    optimiser.step()
    assert head["kappa"].item() == pytest.approx(twin.item(), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(bad):
    named, twin = parameters(), parameters()
    optimiser = Optimiser(named, learning_rate=0.1, **OPTIONS)
    other = Optimiser(twin, learning_rate=0.1, **OPTIONS)
    for each, owner in ((named, optimiser), (twin, other)):
        give_gradients(each, 0)
        owner.step()
    give_gradients(named, 1)
    named["p0"].grad[0, 0] = bad
    with pytest.raises(FloatingPointError, match=r"norm is (nan|inf) at update 1: .*learning rate"):
        optimiser.step()
    assert all(p.grad is None for p in named.values())
    # What follows is as if the bad gradient had never been.
    for each, owner in ((named, optimiser), (twin, other)):
        give_gradients(each, 2)
        owner.step()
    assert all(torch.equal(named[name], twin[name]) for name in named)


def test_restoring_goes_on_with_the_same_bits():
    options = {"learning_rate": 0.1, "warmup": 3, "updates": 10, "final_fraction": 0.2, **OPTIONS}
    named = parameters()
    optimiser = Optimiser(named, **options)
    for i in range(4):
        give_gradients(named, i)
        optimiser.step()
    tensors, state = optimiser.state("opt")
    tensors = {name: value.clone() for name, value in tensors.items()}
    copy = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
    other = Optimiser(copy, **options)
    other.restore(tensors, state, "opt")
    for i in range(4, 8):
        for each, owner in ((named, optimiser), (copy, other)):
            give_gradients(each, i)
            owner.step()
    assert all(torch.equal(named[name], copy[name]) for name in named)


def test_a_retired_optimiser_holds_nothing_and_makes_no_updates():
    named = parameters()
    optimiser = Optimiser(named, learning_rate=0.1, **OPTIONS)
    give_gradients(named, 0)
    optimiser.step()
    optimiser.retire()
    tensors, state = optimiser.state("opt")
    assert tensors == {}
    assert not optimiser.adamw.state
    other = Optimiser(parameters(), learning_rate=0.1, **OPTIONS)
    other.restore({}, state, "opt")
    for each in (optimiser, other):
        assert each.updates == 1
        with pytest.raises(RuntimeError, match="retired"):
            each.step()
