"""The compiled CUDA kernels on a GPU, through the public operators, against the oracle.

What the emulator cannot show: that what nvcc made computes the same, clusters of blocks included,
which few rows of a large vocabulary take.
"""

from importlib.util import find_spec

import pytest
import torch

import airl_fast
from airl_fast import linear_policy_loss
from tests import oracle
from tests.ops import head_calls, policy_loss_calls

DEVICE, BACKEND = "cuda", "cuda"

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("airl_fast._cuda") is None,
    reason="needs a GPU and the CUDA kernels",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = {"one": [1], "short": [3, 1, 7], "long": [1500, 1, 255], "many": [1] * 300}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Every operator is served by these kernels or raises, and refuses bad values at once."""
    monkeypatch.setenv("AIRL_FAST_BLOCKING", "1")
    with airl_fast.backend(BACKEND):
        yield


def on_device(*tensors):
    return tuple(t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", head_calls.HEADS)
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (33, 7), (9, 1031), (5, 128_256), (300, 32_001)])
def test_log_probs_and_gradients_are_as_good_as_plain_torch(n, vocab, head, dtype):
    tensors = on_device(*head_calls.inputs(n, vocab, width=16, dtype=dtype))
    options, wanted = head_calls.HEADS[head], [tensors[0], tensors[1], tensors[3]]
    got = head_calls.results(head_calls.fused, tensors, wanted, **options)
    naive = head_calls.results(head_calls.plain_torch, tensors, wanted, **options)
    truth = head_calls.results(oracle.linear_logprob, tensors, wanted, **options)
    head_calls.assert_as_good_as_plain(got, naive, truth, dtype)
    again = head_calls.results(head_calls.fused, tensors, wanted, **options)
    for first, second in zip(got, again, strict=True):
        assert torch.equal(first, second)


POLICIES = {
    "plain": {},
    "clipped": {"clip_low": 0.1, "clip_high": 0.3, "delta": 1.5, "entropy_coef": 0.02},
    "sequence": {"importance": "sequence", "beta": 0.1, "aggregation": "sequence"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("vocab", [13, 1031, 128_256, 248_320])
def test_policy_losses_and_gradients(vocab, policy, dtype):
    tensors = policy_loss_calls.inputs(vocab=vocab, dtype=dtype)
    tensors = dict(zip(tensors, on_device(*tensors.values()), strict=True))
    wanted, options = policy_loss_calls.leaves(tensors), POLICIES[policy]
    loss, stats = linear_policy_loss(**tensors, **options)
    got = policy_loss_calls.gradients(loss, wanted)
    exact, _ = oracle.policy_loss(**tensors, **options)
    truth = policy_loss_calls.gradients(exact, wanted)
    assert loss.item() == pytest.approx(exact.item(), abs=2e-5, rel=2e-5)
    head = {name: tensors[name] for name in ("hidden", "weight", "targets", "bias")}
    assert torch.allclose(stats.logp.double(), oracle.linear_logprob(**head)[0], atol=2e-5)
    for found, right in zip(got, truth, strict=True):
        bound = 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item()) + 1e-6
        assert (found.double() - right.double()).abs().max().item() <= bound
    for first, second in zip(
        got,
        policy_loss_calls.gradients(linear_policy_loss(**tensors, **options)[0], wanted),
        strict=True,
    ):
        assert torch.equal(first, second)


SEGMENTS = {"segment_sum": (), "segment_mean": (), "segment_last": (), "segment_softmax": ()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", [*SEGMENTS, "discounted_returns"])
def test_segments_and_returns_with_their_gradients(name, lengths, dtype):
    more = SEGMENTS.get(name, (0.95,))
    cu = torch.tensor([0, *LENGTHS[lengths]]).cumsum(0).int().to(DEVICE)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(int(cu[-1]), generator=g).to(DEVICE, dtype).requires_grad_()
    got, exact = (getattr(m, name)(x, cu, *more) for m in (airl_fast, oracle))
    assert torch.allclose(got.double(), exact, rtol=1e-6, atol=1e-6)
    up = torch.randn(len(got), generator=g).to(DEVICE)
    pair = [torch.autograd.grad(y, x, up.to(y.dtype))[0] for y in (got, exact)]
    assert torch.allclose(*pair, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("form", ["airl", "logit", "wgan"])
@pytest.mark.parametrize("spans", [1, 7, 5000])
def test_discriminator_losses_and_gradients(spans, form):
    g = torch.Generator().manual_seed(0)
    f = (4 * torch.randn(spans, generator=g)).to(DEVICE).requires_grad_()
    logp = (-3 * torch.rand(spans, generator=g)).to(DEVICE).requires_grad_()
    expert = (torch.rand(spans, generator=g) > 0.6).to(DEVICE)
    loss, stats = airl_fast.discriminator_loss(f, logp, expert, form=form)
    exact, named = oracle.discriminator_loss(f, logp, expert, form=form)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-6)
    assert stats.accuracy.item() == pytest.approx(named["accuracy"], rel=1e-6)
    wanted = (f, logp) if form == "airl" else (f,)
    pairs = [torch.autograd.grad(y, wanted) for y in (loss, exact)]
    for found, right in zip(*pairs, strict=True):
        assert torch.allclose(found, right, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("span_logp", ["sum", "mean"])
def test_scores_of_spans(span_logp, rows, dtype):
    g = torch.Generator().manual_seed(0)
    sizes = {"hidden": (23, 11), "weight": (60, 11), "own": (23, 1033), "row": (rows, 1033)}
    made = {n: torch.randn(s, generator=g).to(DEVICE, dtype) for n, s in sizes.items()}
    targets = torch.randint(0, 60, (23,), generator=g).to(DEVICE)
    call = made["hidden"], made["weight"], targets, made["own"], made["row"]
    cu = torch.tensor([0, 1, 9, 10, 20, 23], dtype=torch.int32, device=DEVICE)
    options = {"span_logp": span_logp}
    if rows == 2:
        ends = torch.tensor([0, 1, 5], dtype=torch.int32, device=DEVICE)
        options |= {"shaping_gamma": 0.9, "cu_seq_spans": ends}
    got = airl_fast.airl_score(*call, cu, **options)
    exact = oracle.airl_score(*call, cu, **options)
    for found, right in zip(got, exact, strict=True):
        assert torch.allclose(found.double(), right, rtol=1e-5, atol=1e-4)


def test_values_that_are_not_finite_are_refused():
    hidden, weight, targets, bias = (
        t.detach() for t in on_device(*head_calls.inputs(5, 80, ignored=0))
    )
    hidden[2, 0] = float("nan")
    with pytest.raises(ValueError, match="logp"):
        airl_fast.linear_logprob(hidden, weight, targets, bias=bias)


def test_what_is_traced_is_what_is_returned():
    """Dtypes included: gradients of bfloat16 wait in bfloat16 on a GPU."""
    hidden, weight, targets, bias = on_device(
        *head_calls.inputs(5, 80, dtype=torch.bfloat16, ignored=0)
    )
    ones = torch.ones(5, device=DEVICE)
    cu_seqs = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    modes = ("token", "token", 1.0, True, True, True)
    given = (hidden, weight, targets, ones, cu_seqs, None, None, bias, 1.0, None, 1.0)
    arguments = (*given, 0.2, 0.2, None, 0.0, 0.0, *modes)
    torch.library.opcheck(
        torch.ops.airl_fast.linear_policy_loss.default, arguments, test_utils="test_faketensor"
    )
    outputs = torch.ops.airl_fast.linear_policy_loss(*arguments)
    assert [x.dtype for x in outputs[1:4]] == [torch.bfloat16] * 3
