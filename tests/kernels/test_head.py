"""The fused forward, the row kernels and the chunked head on the Triton backend."""

import math
from itertools import product

import pytest
import torch

from airl_fast import linear_logprob, linear_policy_loss
from airl_fast.ops import _gpu_head, _triton
from airl_fast.ops._gpu_rows import gradient_view, row_head
from tests import oracle
from tests.ops.head_calls import (
    HEADS,
    assert_as_good_as_plain,
    fused,
    inputs,
    plain_torch,
    results,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ids = {"ids": lambda x: str(x).removeprefix("torch.")}


def on(device, *tensors):
    return tuple(t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors)


@pytest.fixture
def small_chunks(monkeypatch):
    """A few rows to a chunk, and 16 rows to a launch of the fused forward."""
    monkeypatch.setattr(_gpu_head, "CHUNK_BYTES", 4 * 4 * 1200)


@pytest.mark.usefixtures("triton_backend", "small_chunks", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("head", HEADS)
def test_forward_and_gradients_are_as_good_as_plain_torch(head, dtype, device):
    tensors = on(device, *inputs(9, 1031, width=37, dtype=dtype))
    wanted = [tensors[0], tensors[1], tensors[3]]
    got = results(fused, tensors, wanted, **HEADS[head])
    naive = results(plain_torch, tensors, wanted, **HEADS[head])
    truth = results(oracle.linear_logprob, tensors, wanted, **HEADS[head])
    assert_as_good_as_plain(got, naive, truth, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize(("n", "vocab", "width"), [(1, 1, 1), (5, 63, 16), (19, 150, 40)])
def test_fused_forward_on_odd_shapes(n, vocab, width, dtype, device, monkeypatch):
    """Any N, V and D, from one tile to several; two launches of 16 rows, and indexed rows."""
    from airl_fast.kernels import linear_logprob as kernels
    from airl_fast.kernels.launch import DotConfig

    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1)
    hidden, weight, targets, bias = (
        t.detach() for t in on(device, *inputs(n, vocab, width, dtype))
    )
    rows = (targets != -100).nonzero().squeeze(-1)
    truth = oracle.linear_logprob(hidden, weight, targets, bias=bias, softcap=4.0)
    head = row_head(bias, 1.0, 4.0, 1.0)
    index = None if len(rows) == n else rows
    found = []
    for config in (DotConfig(16, 32, 16, 2, 2, 4, 3), DotConfig(32, 16, 32, 3, 1, 4, 3)):
        out = torch.empty(2, len(rows), device=device)
        kernels.read_head(hidden, weight, targets[rows], head, index, *out, config)
        for got, exact in zip(out, truth, strict=True):
            assert torch.allclose(got.double(), exact[rows], rtol=1e-5, atol=1e-5)
        found.append(out)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("triton_backend")
def test_empty_and_fully_ignored(device):
    hidden, weight, _, bias = on(device, *inputs(4, 50))
    for n in (0, 4):
        ignored = torch.full((n,), -100, device=device)
        logp, entropy = linear_logprob(hidden[:n], weight, ignored, bias=bias, return_entropy=True)
        (logp.sum() + entropy.sum()).backward()
        assert logp.tolist() == entropy.tolist() == [0.0] * n
        assert weight.grad.abs().max() == 0


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
def test_signs_and_precision_at_logits_of_1e4(dtype, device):
    g = torch.Generator().manual_seed(0)
    hidden = (100 * torch.randn(6, 8, generator=g)).to(device, dtype)
    weight = (100 * torch.randn(700, 8, generator=g)).to(device, dtype)
    best = (hidden.double() @ weight.double().T).argmax(1)
    for targets in (best, best.flip(0)):
        logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
        truth = oracle.linear_logprob(hidden, weight, targets)
        assert (logp <= 0).all()
        assert (entropy >= 0).all()
        assert (entropy <= math.log(700)).all()
        assert torch.allclose(logp.double(), truth[0], rtol=1e-6, atol=2e-2)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **ids)
def test_the_same_bits_twice_and_beside_other_rows(dtype, device):
    hidden, weight, targets, bias = on(device, *inputs(21, 300, dtype=dtype, ignored=0))
    first, second = (linear_logprob(hidden, weight, targets, bias=bias) for _ in range(2))
    alone = linear_logprob(hidden[7:9], weight, targets[7:9], bias=bias)
    assert torch.equal(first, second)
    if dtype == torch.bfloat16:  # torch's own product may depend on the number of rows
        assert torch.equal(first[7:9], alone)


@pytest.mark.usefixtures("triton_backend")
def test_non_finite_logits_are_refused(device):
    hidden, weight, targets, bias = (t.detach() for t in on(device, *inputs(5, 80, ignored=0)))
    for dtype, value in product((torch.float32, torch.bfloat16), (float("nan"), float("inf"))):
        spoiled = hidden.to(dtype).clone()
        spoiled[2, 0] = value
        with pytest.raises(ValueError, match="logp"):
            linear_logprob(spoiled, weight.to(dtype), targets, bias=bias)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2], **ids)
@pytest.mark.parametrize("block", [64, 512])
def test_rows_are_overwritten_in_place_and_nothing_beside_them(dtypes, block, device):
    """A half gradient over float32 logits too; with statistics kept from `read`, or not."""
    from airl_fast.kernels.launch import RowConfig
    from airl_fast.kernels.rows import TritonRows

    rows, vocab = 3, 301
    g = torch.Generator().manual_seed(0)
    memory = torch.full((rows, 320), float("nan"), dtype=dtypes[0], device=device)
    memory[:, :vocab] = (3 * torch.randn(rows, vocab, generator=g)).to(memory)
    targets = torch.tensor([0, 300, 17], device=device)
    bias = torch.randn(vocab, generator=g).to(device)
    d_logp, d_entropy = torch.randn(2, rows, generator=g).to(device)
    a = memory[:, :vocab].double().requires_grad_()
    eye = torch.eye(vocab, dtype=torch.float64, device=device)
    exact = oracle.linear_logprob(a, eye, targets, bias=bias, softcap=3.0, temperature=1.3)
    (d_a,) = torch.autograd.grad((exact[0] * d_logp + exact[1] * d_entropy).sum(), a)
    kernels, head = TritonRows(RowConfig(block, 4)), row_head(bias, 1.3, 3.0, 1.0)
    out = torch.full((2, rows), float("nan"), device=device)
    stats = torch.full((rows, 4), float("nan"), device=device)
    kernels.read(memory[:, :vocab], head, targets, *out, stats)
    assert torch.allclose(out.double(), torch.stack(exact), atol=3e-6)
    for kept in (stats, None):
        copy = memory.clone()
        logits = copy[:, :vocab]
        gradient = gradient_view(logits, dtypes[1])
        kernels.differentiate(logits, head, targets, d_logp, d_entropy, kept, gradient)
        error = (gradient - d_a).abs().max()
        assert error <= 2 * torch.finfo(dtypes[1]).eps * d_a.abs().max() + 1e-6
        assert copy[:, vocab:].isnan().all()


POLICIES = {
    "plain": {},
    "old": {"old_logp": True, "clip_low": 0.1, "clip_high": 0.3},
    "delta": {"old_logp": True, "delta": 1.5, "entropy_coef": 0.02},
    "ref": {"old_logp": True, "ref_logp": True, "beta": 0.1, "aggregation": "sequence"},
    "sequence": {"old_logp": True, "importance": "sequence", "entropy_coef": 0.01},
    "constant": {"ref_logp": True, "beta": 0.2, "aggregation": "constant", "normaliser": 7.0},
}


@pytest.mark.usefixtures("triton_backend", "small_chunks", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("policy", POLICIES)
def test_policy_loss(policy, dtype, device):
    """Against the oracle, within twice the error of plain torch (the reference composed in it)."""
    tensors = on(device, *inputs(17, 333, width=13, dtype=dtype))
    hidden, weight, targets, bias = tensors
    noise = torch.randn(3, 17, generator=torch.Generator().manual_seed(3)).to(device)
    options = dict(POLICIES[policy])
    near = oracle.linear_logprob(hidden, weight, targets, bias=bias, softcap=5.0)[0].detach()
    for i, name in enumerate(("old_logp", "ref_logp")):
        if name in options:
            options[name] = (near + 0.3 * noise[i]).float()
    options["cu_seqs"] = torch.tensor([0, 2, 13, 17], dtype=torch.int32, device=device)
    call = hidden, weight, targets, noise[2]
    wanted = hidden, weight, bias
    loss, stats = linear_policy_loss(*call, bias=bias, softcap=5.0, **options)
    exact, _ = oracle.policy_loss(*call, bias=bias, softcap=5.0, **options)
    assert loss.item() == pytest.approx(exact.item(), abs=2e-5, rel=2e-5)
    assert torch.allclose(stats.logp.double(), near, atol=1e-5)
    pairs = zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(exact, wanted), strict=True)
    for got, truth in pairs:
        eps = torch.finfo(dtype).eps
        assert (got.double() - truth.double()).abs().max() <= 4 * eps * max(1, truth.abs().max())


@pytest.mark.usefixtures("triton_backend")
def test_policy_loss_without_gradients_is_scored(device):
    hidden, weight, targets, bias = (t.detach() for t in on(device, *inputs(5, 80)))
    cu_seqs = torch.tensor([0, 5], dtype=torch.int32, device=device)
    advantages = torch.ones(5, device=device)
    loss, _ = linear_policy_loss(hidden, weight, targets, advantages, bias=bias, cu_seqs=cu_seqs)
    assert loss.item() == pytest.approx(-1.0)


def test_float16_shares_are_scaled_over_its_range(device):
    """A share of 1e-9 would be 0 in float16."""
    hidden, weight, targets, _ = on(device, *inputs(6, 50, dtype=torch.float16, ignored=0))
    cu_seqs = torch.tensor([0, 6], dtype=torch.int32, device=device)
    advantages = torch.linspace(-1, 1, 6, device=device)
    wanted = hidden, weight
    needs = {"cu_seqs": cu_seqs, "aggregation": "constant", "normaliser": 1e9}
    with _forced():
        loss, _ = linear_policy_loss(hidden, weight, targets, advantages, **needs)
        got = torch.autograd.grad(loss, wanted, torch.tensor(1e9, device=device))
    exact, _ = oracle.policy_loss(hidden, weight, targets, advantages, **needs)
    truth = torch.autograd.grad(
        exact, wanted, torch.tensor(1e9, dtype=torch.float64, device=device)
    )
    for a, b in zip(got, truth, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=5e-3, atol=5e-3)


def _forced():
    import airl_fast

    return airl_fast.backend("triton")


def test_a_device_or_dtype_that_it_does_not_serve_is_named(device):
    hidden = torch.zeros(2, 3, device=device)
    assert "float64" in _triton.serves_head(hidden.double())
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    with _forced(), pytest.raises(RuntimeError, match="float64"):
        linear_logprob(hidden.double(), hidden.double(), targets)
    if device.type == "cpu":
        assert "only where the backend is forced" in _triton.serves(hidden)
