"""Group advantages against the oracle, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import airl_fast
from airl_fast import group_advantages
from tests import oracle

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none")
EVERY = [(baseline, scale) for baseline in BASELINES for scale in SCALES]
SCATTERED = torch.tensor([7, -3, 7, 2**40, -3, 7, 2**40, 2**40, 2**40])


def values(n: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=g, dtype=torch.float64) * magnitude).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    eps = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=eps * scale)


@pytest.mark.parametrize(("baseline", "scale"), EVERY)
@pytest.mark.parametrize("magnitude", [1.0, 1e4, 1e-3])
def test_equals_the_oracle_in_value_and_gradient(baseline, scale, magnitude):
    r = values(9, magnitude=magnitude).requires_grad_()
    options = {"baseline": baseline, "scale": scale}
    got = group_advantages(r, SCATTERED, **options)
    expected = oracle.group_advantages(r, SCATTERED, **options)
    assert got.dtype == torch.float32
    close(got, expected, scale=1.0 if scale == "std" else magnitude)
    upstream = values(10)[1:] * 3
    (gradient,) = torch.autograd.grad(got, r, upstream)
    (want,) = torch.autograd.grad(expected, r, upstream.double())
    close(gradient, want.double(), scale=want.abs().max().item())


@pytest.mark.parametrize("baseline", ["mean", "none"])
@pytest.mark.parametrize("scale", SCALES)
def test_groups_of_one(baseline, scale):
    r, group = values(3), torch.tensor([4, 2, 9])
    options = {"baseline": baseline, "scale": scale}
    got = group_advantages(r, group, **options)
    close(got, oracle.group_advantages(r, group, **options), scale=1e6)
    if baseline == "mean":
        assert torch.equal(got, torch.zeros(3))


@pytest.mark.parametrize(("baseline", "scale"), EVERY)
def test_equal_rewards_give_no_advantage_and_finite_gradients(baseline, scale):
    r = torch.full((6,), 0.1, requires_grad=True)
    got = group_advantages(r, torch.zeros(6, dtype=torch.int64), baseline=baseline, scale=scale)
    if baseline != "none":
        assert got.abs().max() < 1e-6
    got.sum().backward()
    assert r.grad is not None
    assert r.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    r = values(9, dtype).requires_grad_()
    got = group_advantages(r, SCATTERED)
    assert got.dtype == torch.float32
    close(got, oracle.group_advantages(r, SCATTERED))
    got.square().sum().backward()
    assert r.grad is not None
    assert r.grad.dtype == dtype


def test_empty_strided_and_expanded():
    none = torch.zeros(0, dtype=torch.int64)
    assert group_advantages(values(0), none).shape == (0,)
    for r in (values(18)[::2], torch.tensor([0.3]).expand(9)):
        group = torch.stack([SCATTERED, SCATTERED], dim=1)[:, 0]
        close(group_advantages(r, group), oracle.group_advantages(r, SCATTERED))
    one_group = torch.tensor([5]).expand(9)
    close(group_advantages(values(9), one_group), oracle.group_advantages(values(9), one_group))


@pytest.mark.parametrize(("baseline", "scale"), EVERY)
def test_opcheck(baseline, scale):
    op = torch.ops.airl_fast.group_advantages.default
    torch.library.opcheck(op, (values(9).requires_grad_(), SCATTERED, baseline, scale))
    torch.library.opcheck(op, (values(9, torch.bfloat16), SCATTERED, baseline, scale))


@pytest.mark.parametrize(("baseline", "scale"), EVERY)
def test_compiled_equals_eager_without_graph_breaks(baseline, scale):
    torch.compiler.reset()  # each case is a program of its own

    def loss(r):
        return group_advantages(r, SCATTERED, baseline=baseline, scale=scale).pow(3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    r = values(9).requires_grad_()
    eager, traced = loss(r), compiled(r)
    torch.testing.assert_close(eager, traced)
    torch.testing.assert_close(*(torch.autograd.grad(y, r)[0] for y in (eager, traced)))


@pytest.mark.parametrize(
    ("r", "group", "options", "message"),
    [
        (values(2), torch.tensor([1, 2]), {"baseline": "leave_one_out"}, "group 1 has one member"),
        (
            values(2),
            torch.tensor([1, 2]),
            {"baseline": "loo"},
            "one of 'mean', .*received 'loo'",
        ),
        (values(2), torch.tensor([1, 2]), {"scale": "max"}, "scale to be one of 'std', 'none'"),
        (values(2), torch.tensor([1]), {}, "2 int64 labels on cpu, received shape \\(1,\\)"),
        (values(2), torch.tensor([1, 2]).int(), {}, "received shape .* of torch.int32"),
        (values(2).view(1, 2), torch.tensor([1, 2]), {}, "one-dimensional"),
        (values(2) / 0, torch.tensor([1, 2]), {}, "expected finite rewards, received"),
    ],
)
def test_errors_say_what_was_received(r, group, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(r, group, **options)


def test_only_the_reference_serves_and_says_so():
    with airl_fast.backend("reference"):
        group_advantages(values(9), SCATTERED)
    with airl_fast.backend("cpu"), pytest.raises(RuntimeError, match="not implemented"):
        group_advantages(values(9), SCATTERED)


@settings(max_examples=40, deadline=None)
@given(
    group=st.lists(st.integers(-2, 2), min_size=1, max_size=20),
    shift=st.floats(-100, 100),
    scale=st.sampled_from(SCALES),
)
def test_properties(group, shift, scale):
    labels, r = torch.tensor(group), values(len(group))
    got = group_advantages(r, labels, scale=scale)
    for label in set(group):
        members = got[labels == label]
        assert members.sum().abs() < 1e-4  # a mean baseline centres every group
        if scale == "std" and len(members) > 1:
            torch.testing.assert_close(members.std(correction=0).item(), 1.0, rtol=1e-3, atol=0)
    shifted = group_advantages(r.double() + shift, labels, scale=scale)
    torch.testing.assert_close(shifted, got, rtol=1e-5, atol=1e-5)  # blind to a shift
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(r[order], labels[order], scale=scale), got[order])
