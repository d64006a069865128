"""The operators over the head on the CUDA backend, its kernels emulated, against the oracle."""

import pytest
import torch

import airl_fast
from airl_fast.ops import _cuda_head, _cuda_spans, _gpu_head, dispatch
from tests import oracle


@pytest.fixture(autouse=True)
def forced(rows, emulated, monkeypatch):
    """Backend "cuda" serves tensors in the CPU's memory, in chunks of three rows."""
    airl_fast.explain()  # imports all operators
    for op in dispatch._registry.values():
        if "cuda" in op:
            served = dispatch.Implementation(op["cuda"].function, dispatch.always)
            monkeypatch.setitem(op, "cuda", served)
    monkeypatch.setattr(_cuda_head, "rows", lambda: rows)
    monkeypatch.setattr(_cuda_spans, "extension", lambda: emulated)
    monkeypatch.setattr(_cuda_spans, "place", lambda tensor: (0, 0))
    monkeypatch.setattr(_gpu_head, "chunk_rows", lambda *sizes: 3)
    with airl_fast.backend("cuda"):
        yield


def inputs(dtype=torch.float32, actions=8, width=6, vocab=203):
    g = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(actions, width, generator=g)).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (actions,), generator=g)
    targets[3] = -100
    bias = torch.randn(vocab, generator=g).requires_grad_()
    return hidden, weight, targets, bias, torch.randn(4, actions, generator=g)


HEAD = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprob_and_its_gradients(dtype):
    hidden, weight, targets, bias, numbers = inputs(dtype)
    given = (hidden, weight, targets)
    found = airl_fast.linear_logprob(*given, bias=bias, return_entropy=True, **HEAD)
    truth = oracle.linear_logprob(*given, bias=bias, **HEAD)
    leaves, upstream = [hidden, weight, bias], list(numbers[:2])
    gradients = torch.autograd.grad(found, leaves, upstream)
    expected = torch.autograd.grad(truth, leaves, [u.double() for u in upstream])
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)
    tolerance = (
        {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    )
    for x, y in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_policy_loss_and_its_gradients(dtype, importance):
    hidden, weight, targets, bias, numbers = inputs(dtype)
    logp, _ = oracle.linear_logprob(hidden, weight, targets, bias=bias, **HEAD)
    options = {
        "cu_seqs": torch.tensor([0, 2, 6, 8], dtype=torch.int32),
        "old_logp": (logp + 0.3 * numbers[1]).float().detach(),
        "ref_logp": (logp + 0.3 * numbers[2]).float().detach(),
        "importance": importance,
        "beta": 0.1,
        "entropy_coef": 0.02,
        "delta": 1.4,
        "bias": bias,
        **HEAD,
    }
    given = (hidden, weight, targets, numbers[0])
    loss, stats = airl_fast.linear_policy_loss(*given, **options)
    truth, expected_stats = oracle.policy_loss(*given, **options)
    leaves = [hidden, weight, bias]
    gradients = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(truth, leaves)
    assert loss.item() == pytest.approx(truth.item(), abs=1e-5)
    assert stats.ratio_mean.item() == pytest.approx(expected_stats["ratio"], abs=1e-5)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.02}
    )
    for x, y in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    with torch.no_grad():
        assert airl_fast.linear_policy_loss(*given, **options)[0].item() == pytest.approx(
            loss.item()
        )


def test_scores_of_spans():
    hidden, weight, targets, bias, _ = inputs()
    targets[3] = 5
    disc_hidden, disc_weight = hidden.detach() + 1, torch.ones(1, 6)
    cu_spans = torch.tensor([0, 1, 4, 8], dtype=torch.int32)
    given = (hidden, weight, targets, disc_hidden, disc_weight, cu_spans)
    found = airl_fast.airl_score(*given, bias=bias, **HEAD)
    truth = oracle.airl_score(*given, bias=bias, **HEAD)
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=1e-5, atol=1e-5)


def test_reading_is_left_to_triton_unless_it_is_forced(monkeypatch):
    monkeypatch.setattr(_cuda_head, "serves", lambda *tensors: None)
    monkeypatch.setattr(_cuda_head, "find_spec", lambda name: object())
    assert _cuda_head.serves_reading(torch.empty(1)) is None
    monkeypatch.setattr(dispatch, "forced", lambda: None)
    assert "Triton's kernel none" in _cuda_head.serves_reading(torch.empty(1))
    monkeypatch.setattr(_cuda_head, "find_spec", lambda name: None)
    assert _cuda_head.serves_reading(torch.empty(1)) is None
