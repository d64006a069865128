"""Segment operators against the oracle, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import airl_fast
from airl_fast import segment_last, segment_mean, segment_softmax, segment_sum
from tests import oracle

NAMES = ("segment_sum", "segment_mean", "segment_last", "segment_softmax")
OPS = {name: getattr(airl_fast, name) for name in NAMES}
BACKENDS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def values(n: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=g, dtype=torch.float64) * magnitude).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, rounding: float = 4) -> None:
    """Within a few float32 roundings of the oracle; all outputs are float32."""
    assert got.dtype == torch.float32
    eps = rounding * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "lengths",
    [(), (1,), (1, 1, 1), (7,), (3, 1, 9), (1025, 1, 3)],
    ids=["empty", "one token", "dense", "sparse", "odd", "long"],
)
def test_equals_the_oracle_in_value_and_gradient(name, backend, lengths):
    cu = offsets(*lengths)
    x = values(sum(lengths)).requires_grad_()
    with airl_fast.backend(backend):
        got = OPS[name](x, cu)
    expected = getattr(oracle, name)(x, cu)
    close(got, expected)
    upstream = values(got.numel() + 1)[1:] * 3  # neither ones nor all equal
    (want,) = torch.autograd.grad(expected, x, upstream.double()) if lengths else (x.detach(),)
    (gradient,) = torch.autograd.grad(got, x, upstream)
    close(gradient, want.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_keep_float32_results_and_gradients_of_their_own(name, dtype):
    cu, x = offsets(2, 5, 1), values(8, dtype).requires_grad_()
    got = OPS[name](x, cu)
    close(got, getattr(oracle, name)(x, cu))
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_strided_and_expanded_values_and_offsets(name, backend):
    cu = offsets(2, 5, 1)
    strided_cu = torch.stack([cu, cu], dim=1)[:, 0]
    strided = torch.stack([values(8), values(8)], dim=1)[:, 1]
    expanded = torch.tensor([0.7]).expand(8)
    for x in (strided, expanded):
        assert not x.is_contiguous() or x.stride() == (0,)
        x = x.detach().requires_grad_()
        with airl_fast.backend(backend):
            got = OPS[name](x, strided_cu)
        close(got, getattr(oracle, name)(x, cu))
        (gradient,) = torch.autograd.grad(got, x, got.detach())  # an expanded upstream, below
        (want,) = torch.autograd.grad(getattr(oracle, name)(x, cu), x, got.detach().double())
        close(gradient, want.double())
        got = OPS[name](x, cu)
        (gradient,) = torch.autograd.grad(got.sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_large_values_stay_exact(name, backend):
    cu, x = offsets(3, 90, 7), values(100, magnitude=1e4)
    with airl_fast.backend(backend):
        close(OPS[name](x, cu), getattr(oracle, name)(x, cu))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_are_accumulated_wider_than_float32(backend):
    x = torch.full((200_000,), 0.1)
    with airl_fast.backend(backend):
        close(segment_sum(x, offsets(200_000)), x.double().sum()[None], rounding=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_span(name, backend, poison):
    cu, x = offsets(2, 3, 2), values(7)
    x[4] = poison  # the last value of the middle span
    with airl_fast.backend(backend):
        got = OPS[name](x, cu)
    close(got, getattr(oracle, name)(x, cu))
    outside = [0, 2] if got.numel() == 3 else [0, 1, 5, 6]
    assert got[outside].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype):
    op = getattr(torch.ops.airl_fast, name).default
    torch.library.opcheck(op, (values(8, dtype).requires_grad_(), offsets(2, 5, 1)))
    torch.library.opcheck(op, (values(0, dtype), offsets()))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager_without_graph_breaks(name):
    compiled = torch.compile(OPS[name], fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in [(2, 5, 1), (3, 4)]:
        cu = offsets(*lengths)
        x = values(sum(lengths)).requires_grad_()
        eager, traced = OPS[name](x, cu), compiled(x, cu)
        assert torch.equal(eager, traced)
        upstream = values(eager.numel())
        want, got = (torch.autograd.grad(y, x, upstream)[0] for y in (eager, traced))
        torch.testing.assert_close(got, want)


def test_no_gradient_is_kept_where_none_is_required():
    assert not segment_sum(values(3), offsets(3)).requires_grad


def test_forced_backends_serve_or_refuse():
    x, cu = values(4, torch.bfloat16), offsets(4)
    with airl_fast.backend("cpu"), pytest.raises(RuntimeError, match="float32 and float64, not bf"):
        segment_sum(x, cu)
    with airl_fast.backend("cuda"), pytest.raises(RuntimeError, match="cannot serve this call"):
        segment_sum(x, cu)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("x", "cu", "message"),
    [
        (values(4), offsets(2, 0, 2), "span 1 of cu is empty or .*, received offsets 2 to 2"),
        (
            values(4),
            offsets(5, -2, 1),
            "span 1 of cu is .* reversed, received offsets 5 to 3",
        ),
        (values(4), offsets(2, 3), "from 0 to 4, the number of values, received 0 to 5"),
        (values(4), offsets(2, 2) + 1, "received 1 to 5"),
        (values(0), offsets(0), "span 0 of cu is empty"),
        (
            values(4),
            torch.tensor([0, 2**31 - 1, -(2**31) + 8, 4], dtype=torch.int32),
            "span 1 of cu is empty or reversed",
        ),
        (values(4), offsets(4).long(), "int32 offsets of shape .* received .* of torch.int64"),
        (values(4), offsets(4)[:0], "received shape \\(0,\\)"),
        (values(4).view(2, 2), offsets(4), "received shape \\(2, 2\\)"),
        (torch.arange(4), offsets(4), "floating point, received .* torch.int64"),
        (values(4), offsets(4).to("meta"), "cu is on meta and the values on cpu"),
    ],
)
def test_errors_say_what_was_received(name, x, cu, message):
    with pytest.raises(ValueError, match=message):
        OPS[name](x, cu)


spans = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(lengths=spans, seed=st.integers(0, 1000), backend=st.sampled_from(BACKENDS))
def test_properties(lengths, seed, backend):
    cu = offsets(*lengths)
    x = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    with airl_fast.backend(backend):
        sums, means, last, p = (op(x, cu) for op in OPS.values())
        close(sums.sum()[None], x.double().sum()[None], rounding=100)
        close(means * cu.diff(), sums.double(), rounding=20)
        close(segment_sum(p, cu), torch.ones(len(lengths), dtype=torch.float64))
        close(segment_softmax(x + 100, cu), p.double(), rounding=200)  # x + 100 itself rounds
        assert torch.equal(last, torch.stack([piece[-1] for piece in x.split(lengths)]))
        alone = [segment_mean(piece, offsets(len(piece))) for piece in x.split(lengths)]
        assert torch.equal(means, torch.cat(alone))
        assert torch.equal(segment_last(means, offsets(len(lengths))), means[-1:])
