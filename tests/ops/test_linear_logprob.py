"""linear_logprob against the float64 oracle and against plain torch at the same dtype."""

import math
from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from airl_fast import linear_logprob
from airl_fast.ops import _head
from tests import oracle
from tests.ops.head_calls import (
    HEADS,
    assert_as_good_as_plain,
    fused,
    inputs,
    plain_torch,
    results,
    upstream,
)

pytestmark = pytest.mark.usefixtures("served_by")


@pytest.fixture
def small_chunks(monkeypatch):
    """Four rows of 1,031 logits to a chunk, more of a smaller vocabulary."""
    monkeypatch.setattr(_head, "CHUNK_BYTES", 4 * 4 * 1031)


def close(found, exact):
    return torch.allclose(found.double(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
# A single logit, fewer logits than a vector register holds, and a prime tail (as 129,920 has one).
@pytest.mark.parametrize("vocab", [1, 7, 1031])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_values_and_gradients_match_the_oracle(n, vocab, head, small_chunks):
    tensors = inputs(n, vocab)
    wanted = [tensors[0], tensors[1], tensors[3]]
    got = results(fused, tensors, wanted, **head)
    naive = results(plain_torch, tensors, wanted, **head)
    truth = results(oracle.linear_logprob, tensors, wanted, **head)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_as_good_as_plain(got, naive, [t.double() for t in truth], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_dtypes(dtype, head, refuses, small_chunks):
    tensors = inputs(33, 1031, width=32, dtype=dtype)
    if refuses(dtype, lambda: fused(*tensors[:3], bias=tensors[3], **head)):
        return
    wanted = [tensors[0], tensors[1], tensors[3]]
    got = results(fused, tensors, wanted, **head)
    naive = results(plain_torch, tensors, wanted, **head)
    truth = [t.double() for t in results(oracle.linear_logprob, tensors, wanted, **head)]
    assert got[0].dtype == got[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in got[2:])
    rounding = torch.float32 if dtype == torch.float64 else dtype  # results are float32 at most
    assert_as_good_as_plain(got, naive, truth, rounding)
    # Logits and sums are float32 whatever the inputs: the values are right to float32 rounding.
    for value, exact in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
@pytest.mark.parametrize("chunk_bytes", [32 * 31, 2**27], ids=["tiles", "one_tile"])
def test_a_frozen_head_gives_the_gradient_at_the_hidden_states(
    chunk_bytes, magnitude, head, monkeypatch
):
    """In tiles of a few tokens; logits that grow with the token's number, so maxima rise."""
    monkeypatch.setattr(_head, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, targets, bias = inputs(9, 61)
    with torch.no_grad():
        weight.copy_(weight[(weight @ hidden.sum(0)).argsort()] * magnitude)
    weight, bias = weight.detach(), bias.detach()
    logp = linear_logprob(hidden, weight, targets, bias=bias, **head)
    (got,) = torch.autograd.grad(logp, hidden, upstream(9)[0])
    exact = hidden.detach().double().requires_grad_()
    truth = oracle.linear_logprob(exact, weight, targets, bias=bias, **head)[0]
    (expected,) = torch.autograd.grad(truth, exact, upstream(9)[0].double())
    torch.testing.assert_close(logp.double(), truth, rtol=1e-5, atol=1e-5 * magnitude)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5 * magnitude**2)


def test_autocast_does_not_round_the_logits():
    tensors = inputs(9, 13)
    wanted = [tensors[0], tensors[1], tensors[3]]
    expected = results(fused, tensors, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(fused, tensors, wanted)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_hidden_and_weight_of_different_dtypes():
    hidden, weight, targets, bias = inputs(9, 13)
    half = hidden.detach().bfloat16().requires_grad_()
    got = results(fused, (half, weight, targets, bias), [half, weight, bias])
    truth = results(oracle.linear_logprob, (half, weight, targets, bias), [half, weight, bias])
    assert [g.dtype for g in got[2:]] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(got[3].double(), truth[3].double(), rtol=1e-5, atol=1e-5)


def strided(x: Tensor) -> Tensor:
    """Equal values in a tensor whose every stride is unusual."""
    wide = x.new_zeros(tuple(2 * s for s in x.shape)).permute(*reversed(range(x.dim()))).clone()
    view = wide.permute(*reversed(range(x.dim())))[(slice(None, None, 2),) * x.dim()]
    return view.copy_(x)


def test_non_contiguous_inputs(small_chunks):
    tensors = [t.detach() for t in inputs(21, 37)]
    odd = [strided(t) for t in tensors]
    assert not any(t.is_contiguous() for t in odd)
    for group in (tensors, odd):
        for i in (0, 1, 3):
            group[i].requires_grad_()
    got = results(fused, odd, [odd[0], odd[1], odd[3]])
    expected = results(fused, tensors, [tensors[0], tensors[1], tensors[3]])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_expanded_inputs_sum_their_gradient(which):
    tensors = list(inputs(8, 11))
    row = tensors[which].detach()[:1].clone().requires_grad_()
    tensors[which] = row.expand_as(tensors[which])
    assert 0 in tensors[which].stride()
    (got,) = results(fused, tensors, [row])[2:]
    (exact,) = results(oracle.linear_logprob, tensors, [row])[2:]
    torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-5)


def test_expanded_targets():
    hidden, weight, _, bias = inputs(8, 11)
    targets = torch.tensor([3]).expand(8)
    expected = oracle.linear_logprob(hidden, weight, targets, bias=bias)[0]
    found, _ = fused(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_gradients_reach_exactly_the_inputs_that_require_them(needs):
    tensors = inputs(9, 13)
    leaves = [tensors[0], tensors[1], tensors[3]]
    everything = results(fused, tensors, leaves)[2:]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    logp, entropy = fused(*tensors[:3], bias=tensors[3])
    assert logp.requires_grad == entropy.requires_grad == any(needs)
    if any(needs):
        torch.autograd.backward([logp, entropy], list(upstream(9)))
    for leaf, need, expected in zip(leaves, needs, everything, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert leaf.grad.is_contiguous()
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("output", [0, 1])
def test_one_result_used_without_the_other(output):
    tensors = inputs(9, 13)
    wanted = [tensors[0], tensors[1], tensors[3]]
    got = torch.autograd.grad(fused(*tensors[:3], bias=tensors[3])[output].sum(), wanted)
    truth = oracle.linear_logprob(*tensors[:3], bias=tensors[3])[output].sum()
    for a, b in zip(got, torch.autograd.grad(truth, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_entropy_is_not_in_the_way_when_not_asked_for():
    hidden, weight, targets, _ = inputs(9, 13)
    logp = linear_logprob(hidden, weight, targets)
    assert isinstance(logp, Tensor)
    assert torch.equal(logp, fused(hidden, weight, targets)[0])


@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_ignored_rows_are_never_read(ignore_index, small_chunks):
    hidden, weight, targets, bias = inputs(17, 1031)
    ignored = targets == -100
    targets[ignored] = ignore_index
    assert ignored.any()
    poisoned = hidden.detach().clone()
    poisoned[ignored] = math.nan
    poisoned.requires_grad_()
    options = {"ignore_index": ignore_index}
    got = results(fused, (poisoned, weight, targets, bias), [poisoned, weight, bias], **options)
    expected = results(fused, (hidden, weight, targets, bias), [hidden, weight, bias], **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert (got[0][ignored] == 0).all()
    assert (got[1][ignored] == 0).all()
    assert (got[2][ignored] == 0).all()


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_do_gives_zeros(n):
    hidden, weight, _, bias = inputs(n, 7)
    targets = torch.full((n,), -100)
    wanted = [hidden, weight, bias]
    for result in results(fused, (hidden, weight, targets, bias), wanted):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_within_bounds(size, dtype):
    hidden, weight, targets, bias = inputs(40, 50, dtype=dtype, ignored=0)
    with torch.no_grad():
        hidden[:20] *= size / 3
        hidden[20:] = 0
        bias[25:] = size  # rows 20 on: half of the vocabulary ties at +-1e4
        bias[:25] = 0
    got = results(fused, (hidden, weight, targets, bias), [hidden, weight, bias])
    logp, entropy = got[:2]
    assert all(t.isfinite().all() for t in got)
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(50) * (1 + 4e-7)).all()
    # Plain log-sum-exp would lose 1e-3 here: log p of the tied rows is known exactly.
    tied = (targets[20:] >= 25) == (size > 0)
    torch.testing.assert_close(logp[20:][tied], torch.full((int(tied.sum()),), -math.log(25)))
    torch.testing.assert_close(entropy[20:], torch.full((20,), math.log(25)))


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_compiled_equals_eager(ignored, small_chunks):
    tensors = inputs(19, 1031, ignored=ignored)
    wanted = [tensors[0], tensors[1], tensors[3]]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    got = results(compiled, tensors, wanted, **HEADS["all"])
    for a, b in zip(got, results(fused, tensors, wanted, **HEADS["all"]), strict=True):
        assert torch.equal(a, b)


def test_inductor_keeps_the_operator_in_one_graph():
    hidden, weight, targets, _ = inputs(19, 37, ignored=0.4)

    @torch.compile(fullgraph=True)
    def loss(hidden, weight, targets):
        return (-2 * linear_logprob(hidden * 2, weight, targets)).mean()

    got = torch.autograd.grad(loss(hidden, weight, targets), [hidden, weight])
    exact = (-2 * oracle.linear_logprob(hidden * 2, weight, targets)[0]).mean()
    for a, b in zip(got, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(dtype, entropy):
    hidden, weight, targets, bias = inputs(5, 7, dtype=dtype)
    op = torch.ops.airl_fast.linear_logprob.default
    for b in (bias, None):
        torch.library.opcheck(op, (hidden, weight, targets, b, 0.7, 3.0, 1.1, -100, entropy))


def test_opcheck_backward():
    hidden, weight, targets, bias = (t.detach() for t in inputs(5, 7))
    grads = torch.randn(3, 5)
    op = torch.ops.airl_fast.linear_logprob_backward.default
    for needs in product([False, True], repeat=3):
        args = (*grads, hidden, weight, targets, bias, 0.7, 3.0, 1.1, -100, *needs)
        torch.library.opcheck(op, args)
    torch.library.opcheck(op, (grads[0], None, grads[2][:0], *args[3:]))


def test_second_derivatives_are_refused():
    hidden, weight, targets, _ = inputs(5, 7)
    logp = linear_logprob(hidden, weight, targets)
    (grad,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


# The backend is the same for every example.
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_and_option(data):
    n, vocab, width = (data.draw(st.integers(low, 9)) for low in (0, 1, 1))
    rows = data.draw(st.integers(1, 10))
    positive = st.floats(0.25, 4.0)
    head = {
        "temperature": data.draw(positive),
        "softcap": data.draw(st.none() | positive),
        "logit_scale": data.draw(positive),
    }
    seed, ignored = data.draw(st.integers(0, 99)), data.draw(st.floats(0, 1))
    tensors = inputs(n, vocab, width, seed=seed, ignored=ignored)
    wanted = [tensors[0], tensors[1], tensors[3]]
    with patch.object(_head, "CHUNK_BYTES", 4 * vocab * rows):
        got = results(fused, tensors, wanted, **head)
    naive = results(plain_torch, tensors, wanted, **head)
    truth = [t.double() for t in results(oracle.linear_logprob, tensors, wanted, **head)]
    if all(map(close, naive, truth)):
        assert all(map(close, got, truth))
    else:  # a head so steep that float32 cannot
        assert_as_good_as_plain(got, naive, truth, torch.float32)
    assert (got[0] <= 0).all()
    assert ((got[1] >= 0) & (got[1] <= math.log(vocab) + 1e-6)).all()


def bad_calls():
    h, w, t = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(4, dtype=torch.int64)
    high, low = t.clone(), t.clone()
    high[2], low[1] = 6, -1
    nan, bias = h.clone(), torch.zeros(6)
    nan[3, 0] = math.nan
    masked = bias.clone()
    masked[5] = -math.inf
    yield "hidden 3-D", (h[None], w, t), {}, r"hidden: expected shape \[N, D\].*reshape"
    yield "hidden int", (h.long(), w, t), {}, "hidden: expected bfloat16.*received torch.int64"
    yield "weight 1-D", (h, w[0], t), {}, r"weight: expected shape \[V, D\], received \(3,\)"
    yield "sharded", (h, torch.zeros(0), t), {}, "ZeRO-3.*GatheredParameters"
    yield "logits", (torch.zeros(4, 6), w, t), {}, "look like logits: pass hidden states"
    yield "width", (torch.zeros(4, 5), w, t), {}, r"hidden \(4, 5\) does not fit weight \(6, 3\)"
    yield "targets length", (h, w, t[:3]), {}, r"targets: expected shape \(4,\).*received \(3,\)"
    yield "targets int32", (h, w, t.int()), {}, "targets: expected torch.int64.*torch.int32"
    yield "target high", (h, w, high), {}, r"targets\[2\] = 6 is outside \[0, 6\).*ignore_index"
    yield "target low", (h, w, low), {}, r"targets\[1\] = -1 is outside"
    yield "bias shape", (h, w, t), {"bias": torch.zeros(3)}, r"bias: expected shape \(6,\)"
    yield "bias int", (h, w, t), {"bias": bias.long()}, "bias: expected bfloat16"
    yield "temperature", (h, w, t), {"temperature": 0.0}, "temperature: expected.*received 0.0"
    yield "softcap", (h, w, t), {"softcap": 0.0}, "softcap: .*received 0.0; use None"
    yield "scale", (h, w, t), {"logit_scale": math.inf}, "logit_scale: .*received inf"
    yield "device", (h, w.to("meta"), t), {}, "weight is on meta but hidden is on cpu"
    yield "nan", (nan, w, t), {}, r"logp\[3\] is nan: hidden, weight or bias"
    yield "masked", (h, w, t), {"bias": masked, "return_entropy": True}, "finite bias such as -1e4"


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [pytest.param(*call[1:], id=call[0]) for call in bad_calls()],
)
def test_errors_say_what_was_received_and_what_to_do(args, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        linear_logprob(*args, **options)


def test_a_sharded_dtensor_is_refused():
    hidden, weight, targets, _ = inputs(4, 6)
    weight.full_tensor = lambda: weight  # what marks a DTensor
    with pytest.raises(ValueError, match=r"weight is a sharded DTensor.*full_tensor\(\)"):
        linear_logprob(hidden, weight, targets)
