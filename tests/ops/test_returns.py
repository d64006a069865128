"""Discounted returns against the oracle, at lengths and discounts where prefix sums fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import airl_fast
from airl_fast import discounted_returns
from tests import oracle

BACKENDS = ("reference", "cpu")
GAMMAS = (0.0, 0.9, 0.999, 1.0)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def values(n: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=g, dtype=torch.float64) * magnitude).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    assert got.dtype == torch.float32
    eps = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=eps * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    "lengths",
    [(), (1,), (1, 1, 1), (3, 1, 8, 17), (2, 4, 16)],
    ids=["empty", "one", "sparse", "odd", "powers of two"],
)
def test_equals_the_oracle_in_value_and_gradient(backend, gamma, lengths):
    cu, r = offsets(*lengths), values(sum(lengths)).requires_grad_()
    expected = oracle.discounted_returns(r, cu, gamma)
    upstream = values(len(r) + 1)[1:] * 3
    with airl_fast.backend(backend):
        got = discounted_returns(r, cu, gamma)
        close(got, expected)
        (gradient,) = torch.autograd.grad(got, r, upstream)
    if lengths:
        close(gradient, torch.autograd.grad(expected, r, upstream.double())[0].double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_ten_thousand_steps(backend, gamma, magnitude):
    cu, r = offsets(10_000, 3), values(10_003, magnitude=magnitude).requires_grad_()
    expected = oracle.discounted_returns(r.detach(), cu, gamma)
    with airl_fast.backend(backend):
        got = discounted_returns(r, cu, gamma)
        (gradient,) = torch.autograd.grad(got.sum(), r)
    close(got, expected, scale=magnitude)
    # d sum(R) / d r_j = sum over i <= j of gamma^(j - i), j counted within its sequence.
    place = torch.cat([torch.arange(10_000), torch.arange(3)]).double()
    geometric = place + 1 if gamma == 1 else (1 - gamma ** (place + 1)) / (1 - gamma)
    torch.testing.assert_close(gradient.double(), geometric, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_both_backends_agree_to_the_last_rounding(gamma):
    cu, r = offsets(1, 5000, 7, 300), values(5308)
    with airl_fast.backend("reference"):
        expected = discounted_returns(r, cu, gamma)
    with airl_fast.backend("cpu"):
        close(discounted_returns(r, cu, gamma), expected.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_keep_float32_results_and_gradients_of_their_own(dtype):
    cu, r = offsets(2, 5), values(7, dtype).requires_grad_()
    got = discounted_returns(r, cu, 0.5)
    close(got, oracle.discounted_returns(r, cu, 0.5))
    got.sum().backward()
    assert r.grad is not None
    assert r.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_rewards(backend):
    cu = offsets(2, 5)
    for r in (values(14)[::2], torch.tensor([0.3]).expand(7), values(7).flip(0)):
        with airl_fast.backend(backend):
            close(discounted_returns(r, cu, 0.9), oracle.discounted_returns(r, cu, 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(dtype, transpose):
    op = torch.ops.airl_fast.discounted_returns.default
    torch.library.opcheck(op, (values(8, dtype).requires_grad_(), offsets(7, 1), 0.9, transpose))
    torch.library.opcheck(op, (values(0, dtype), offsets(), 0.9, transpose))


def test_the_second_derivative_is_that_of_a_linear_map():
    r, cu = values(6).double().requires_grad_(), offsets(4, 2)
    upstream = values(6).requires_grad_()
    (gradient,) = torch.autograd.grad(
        discounted_returns(r, cu, 0.9), r, upstream, create_graph=True
    )
    probe = values(6) * 2
    (again,) = torch.autograd.grad(gradient, upstream, probe.double())
    close(again, oracle.discounted_returns(probe, cu, 0.9))


def test_compiled_equals_eager_without_graph_breaks():
    compiled = torch.compile(discounted_returns, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in [(2, 5, 1), (3, 4)]:
        cu, r = offsets(*lengths), values(sum(lengths)).requires_grad_()
        eager, traced = discounted_returns(r, cu, 0.9), compiled(r, cu, 0.9)
        assert torch.equal(eager, traced)
        upstream = values(len(r))
        want, got = (torch.autograd.grad(y, r, upstream)[0] for y in (eager, traced))
        assert torch.equal(want, got)


def test_overflowed_gradients_pass_through_for_the_optimiser_to_see():
    r = values(3).requires_grad_()
    discounted_returns(r, offsets(3), 1.0).backward(torch.tensor([0.0, torch.inf, 0.0]))
    assert r.grad is not None
    assert r.grad.tolist() == [0.0, torch.inf, torch.inf]


@pytest.mark.parametrize(
    ("r", "cu", "gamma", "message"),
    [
        (values(4), offsets(2, 0, 2), 1.0, "span 1 of cu is empty"),
        (values(4), offsets(2, 3), 1.0, "from 0 to 4, the number of values, received 0 to 5"),
        (values(4), offsets(4), 1.01, "gamma in \\[0, 1\\], received 1.01"),
        (values(4), offsets(4), -0.1, "received -0.1"),
        (values(4), offsets(4), float("nan"), "received nan"),
        (values(4).log(), offsets(4), 1.0, "expected finite rewards, received nan at index"),
        (values(4).view(2, 2), offsets(4), 1.0, "rewards to be one-dimensional"),
        (values(4), offsets(4).long(), 1.0, "int32 offsets"),
    ],
)
def test_errors_say_what_was_received(r, cu, gamma, message):
    with pytest.raises(ValueError, match=message):
        discounted_returns(r, cu, gamma)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    gamma=st.floats(0, 1),
    backend=st.sampled_from(BACKENDS),
)
def test_properties(lengths, gamma, backend):
    cu, r = offsets(*lengths), values(sum(lengths))
    with airl_fast.backend(backend):
        got = discounted_returns(r, cu, gamma)
        close(got, oracle.discounted_returns(r, cu, gamma))
        # Nothing crosses a boundary: each sequence alone gives the same.
        alone = [
            discounted_returns(piece, offsets(len(piece)), gamma) for piece in r.split(lengths)
        ]
        close(got, torch.cat(alone).double())
        close(discounted_returns(2 * r, cu, gamma), 2 * got.double())
