"""The eager path: the same results and the same errors as the operators that it passes by."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import airl_fast
from airl_fast import _C, discounted_returns
from airl_fast.ops import _eager
from tests import oracle


def returns(x, cu):
    return discounted_returns(x, cu, 0.9)


PUBLIC = {
    "segment_sum": airl_fast.segment_sum,
    "segment_mean": airl_fast.segment_mean,
    "segment_last": airl_fast.segment_last,
    "segment_softmax": airl_fast.segment_softmax,
    "discounted_returns": returns,
}
EAGER = {
    "segment_sum": _C.eager_sum,
    "segment_mean": _C.eager_mean,
    "segment_last": _C.eager_last,
    "segment_softmax": _C.eager_softmax,
    "discounted_returns": lambda x, cu: _C.eager_returns(x, cu, 0.9, False),
}
pytestmark = pytest.mark.skipif(not _eager.SERVES, reason="this torch has no exchange interface")
every = pytest.mark.parametrize("name", PUBLIC)
differentiable = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def operator(name, x, cu):
    op = getattr(torch.ops.airl_fast, name)
    return op(x, cu, 0.9, False) if name == "discounted_returns" else op(x, cu)


def exact(name, x, cu):
    truth = getattr(oracle, name)
    return truth(x, cu, 0.9) if name == "discounted_returns" else truth(x, cu)


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def values(n, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)


LENGTHS = [
    (),
    (1,),
    (1, 1, 1),
    (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33),
    (70_000, 1, 300),
    (37,) * 2000,
]


@every
@differentiable
@pytest.mark.parametrize("lengths", LENGTHS, ids=["empty", "one", "dense", "odd", "long", "many"])
def test_the_same_bits_as_the_operator_and_the_oracle(name, dtype, lengths, path):
    x, cu = values(sum(lengths), dtype), offsets(*lengths)
    got = EAGER[name](x, cu)
    assert type(got) is torch.Tensor
    assert got.dtype == torch.float32
    assert torch.equal(got, operator(name, x, cu))
    if len(x) < 1000:
        torch.testing.assert_close(got.double(), exact(name, x, cu), rtol=5e-7, atol=5e-7)


@every
@pytest.mark.parametrize("threads", [2, 3])
def test_the_result_does_not_depend_on_the_threads(name, threads):
    x, cu = values(37 * 3000), offsets(*(37,) * 3000)
    alone, before = EAGER[name](x, cu), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(EAGER[name](x, cu), alone)
    finally:
        torch.set_num_threads(before)


@every
@pytest.mark.parametrize(
    "x",
    [values(16)[::2], values(8).flip(0), values(16).view(8, 2)[:, 1], torch.tensor(0.7).expand(8)],
    ids=["every other", "turned", "column", "expanded"],
)
def test_strided_values_are_served(name, x):
    cu = offsets(2, 5, 1)
    got = EAGER[name](x, cu)
    torch.testing.assert_close(got.double(), exact(name, x, cu), rtol=5e-7, atol=5e-7)


@every
def test_a_view_with_the_sign_turned_lazily_is_read_as_what_it_stands_for(name):
    x = torch.complex(values(8), values(8)).conj().imag
    assert x.is_neg()
    assert EAGER[name](x, offsets(2, 5, 1)) is None
    torch.testing.assert_close(PUBLIC[name](x, offsets(8)), PUBLIC[name](-values(8), offsets(8)))


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


@every
@pytest.mark.parametrize(
    ("x", "cu"),
    [
        (values(8, torch.bfloat16), offsets(2, 6)),
        (values(8, torch.float16), offsets(2, 6)),
        (values(8), torch.stack([offsets(2, 6)] * 2, 1)[:, 0]),
        (values(8).as_subclass(Marked), offsets(2, 6)),
        (torch.nn.Parameter(values(8), requires_grad=False), offsets(2, 6)),
    ],
    ids=["bfloat16", "float16", "strided offsets", "subclass", "parameter"],
)
def test_what_the_eager_path_leaves_to_the_operator_still_works(name, x, cu):
    assert EAGER[name](x, cu) is None
    torch.testing.assert_close(
        PUBLIC[name](x, cu).as_subclass(torch.Tensor).double(), exact(name, x, cu)
    )


@every
@pytest.mark.parametrize(
    ("x", "cu"),
    [
        (values(4), offsets(2, 0, 2)),
        (values(4), offsets(2, 3)),
        (values(4), offsets(2, 2) + 1),
        (values(4), offsets(4).long()),
        (values(4), offsets(4)[:0]),
        (values(4), torch.tensor([0, 2**31 - 1, -(2**31) + 8, 4], dtype=torch.int32)),
        (values(4).view(2, 2), offsets(4)),
        (torch.arange(4), offsets(4)),
        (values(4).to("meta"), offsets(4)),
        (values(4).to_sparse(), offsets(4)),
        ([1.0], offsets(1)),
    ],
)
def test_whatever_is_wrong_is_left_to_the_checks_of_the_operator(name, x, cu):
    assert EAGER[name](x, cu) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 5, 99])
def test_rewards_that_are_not_finite_are_left_to_the_checks(bad, at, path):
    r = values(100)
    r[at] = bad
    assert _C.eager_returns(r, offsets(1, 99), 0.9, False) is None
    assert isinstance(_C.eager_returns(r, offsets(1, 99), 0.9, True), torch.Tensor)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), True, "1", None])
def test_an_odd_gamma_is_left_to_the_checks(gamma):
    assert _C.eager_returns(values(4), offsets(4), gamma, False) is None


@every
def test_a_forced_backend_is_heeded(name, monkeypatch):
    x, cu = values(8), offsets(2, 6)
    with airl_fast.backend("cpu"):
        assert isinstance(EAGER[name](x, cu), torch.Tensor)
    for other in ("reference", "triton", "cuda"):
        with airl_fast.backend(other):
            assert EAGER[name](x, cu) is None
    monkeypatch.setenv("AIRL_FAST_BACKEND", "reference")
    assert EAGER[name](x, cu) is None
    monkeypatch.setenv("AIRL_FAST_BACKEND", "cpu")
    assert isinstance(EAGER[name](x, cu), torch.Tensor)


class Functions(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


@every
@pytest.mark.parametrize("mode", [Functions, Operators])
def test_modes_see_the_operator(name, mode):
    with mode() as seen:
        PUBLIC[name](values(8), offsets(2, 6))
    assert any(name in called for called in seen.called)


@every
def test_the_tracer_records_the_operator(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and checks by itself
        traced = torch.jit.trace(PUBLIC[name], (values(8), offsets(2, 6)), check_trace=False)
    x, cu = values(9), offsets(4, 5)
    assert torch.equal(traced(x, cu), PUBLIC[name](x, cu))


@every
def test_functorch_and_forward_mode_reach_the_operator(name):
    x, cu = values(8), offsets(2, 6)
    seen = []

    def inside(row):
        seen.append(EAGER[name](row, cu))
        seen.append(EAGER[name](x, cu))
        return row

    torch.vmap(inside)(torch.stack([x, x]))
    torch.func.grad(lambda row: inside(row).sum())(x)
    with forward_ad.dual_level():
        inside(forward_ad.make_dual(x, x))
    assert seen == [None] * 6


@every
@differentiable
def test_gradients_are_those_of_the_operator(name, dtype):
    cu = offsets(2, 5, 1, 40)
    for x in (values(48, dtype), values(96, dtype)[::2]):
        x.requires_grad_()
        assert EAGER[name](x, cu) is False
        got, want = PUBLIC[name](x, cu), operator(name, x, cu)
        assert torch.equal(got, want)
        for upstream in (values(len(got)), torch.tensor(0.3).expand(len(got))):
            ours, theirs, truth = (
                torch.autograd.grad(y, x, upstream.to(y.dtype), retain_graph=True)[0]
                for y in (got, want, exact(name, x, cu))
            )
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert not PUBLIC[name](x, cu).requires_grad


@every
def test_second_derivatives_are_those_of_the_oracle(name):
    cu, x = offsets(2, 5, 1), values(8).double().requires_grad_()
    upstream = values(len(PUBLIC[name](x, cu))).double().requires_grad_()
    seconds = []
    for y in (PUBLIC[name](x, cu), exact(name, x, cu)):
        (first,) = torch.autograd.grad(y, x, upstream.to(y.dtype), create_graph=True)
        probe = (first * values(8).double()).sum()
        seconds.append(torch.autograd.grad(probe, [x, upstream], allow_unused=True))
    for got, expected in zip(*seconds, strict=True):
        expected = torch.zeros_like(x) if expected is None else expected
        got = torch.zeros_like(expected) if got is None else got
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@every
def test_offsets_changed_before_the_backward_pass_are_noticed(name):
    x, cu = values(8).requires_grad_(), offsets(2, 6)
    y = PUBLIC[name](x, cu)
    kept = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    cu[1] = 100
    if name == "segment_last":  # which keeps the indices, not the offsets
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], kept)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every
def test_inference_mode_and_autocast_change_nothing(name):
    x, cu = values(8), offsets(2, 6)
    expected = PUBLIC[name](x, cu)
    with torch.inference_mode():
        inside = PUBLIC[name](x, cu)
        assert inside.is_inference() == operator(name, x, cu).is_inference()
    assert torch.equal(inside, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PUBLIC[name](x, cu), expected)
    assert expected.data_ptr() % 64 == 0


@every
@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_without_graph_breaks(name, recorded):
    compiled = torch.compile(PUBLIC[name], fullgraph=True, backend="aot_eager", dynamic=True)
    x, cu = values(8).requires_grad_(recorded), offsets(2, 6)
    assert torch.equal(compiled(x, cu), PUBLIC[name](x, cu))
