"""The CUDA span kernels, emulated, against the oracle."""

import math

import pytest
import torch

from airl_fast.ops import _cuda_spans, discriminator_loss
from tests import oracle

LENGTHS = [[1], [3, 1, 7], [255, 256, 257], [1500, 1], [1] * 40]


def cuts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def values(count, dtype=torch.float32, seed=0):
    """Float numbers of a vector that is a column of a matrix: stride 3."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g).to(dtype)[:, 1]


@pytest.fixture(autouse=True)
def on_the_cpu(emulated, monkeypatch):
    monkeypatch.setattr(_cuda_spans, "extension", lambda: emulated)
    monkeypatch.setattr(_cuda_spans, "place", lambda tensor: (0, 0))
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        return empty(self, *args, **options).fill_(math.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}-{x[0]}")
@pytest.mark.parametrize("name", ["segment_sum", "segment_mean", "segment_last", "segment_softmax"])
def test_reductions_match_the_oracle(name, lengths, dtype):
    x, cu = values(sum(lengths), dtype), cuts(lengths)
    found = getattr(_cuda_spans, name)(x, cu)
    torch.testing.assert_close(found, getattr(oracle, name)(x, cu).float(), rtol=1e-7, atol=1e-8)
    assert torch.equal(found, getattr(_cuda_spans, name)(x, cu))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}-{x[0]}")
def test_returns_match_the_oracle_both_ways(lengths, gamma):
    x, cu = values(sum(lengths)), cuts(lengths)
    found = _cuda_spans.discounted_returns(x, cu, gamma, False)
    truth = oracle.discounted_returns(x, cu, gamma).float()
    torch.testing.assert_close(found, truth, rtol=1.2e-7, atol=1e-9)
    # The transpose of the scan is the scan of the reversed sequences.
    found = _cuda_spans.discounted_returns(x.flip(0), cuts(lengths[::-1]), gamma, True)
    torch.testing.assert_close(found.flip(0), truth, rtol=1.2e-7, atol=1e-9)


def test_what_is_not_finite_stays_in_its_span():
    x, cu = values(900), cuts([300, 300, 300])
    x[450] = math.nan
    for forwards in (False, True):
        found = _cuda_spans.discounted_returns(x, cu, 0.9, forwards).isnan()
        assert torch.equal(
            found.nonzero().flatten()[[0, -1]], torch.tensor([450, 599] if forwards else [300, 450])
        )
    assert _cuda_spans.segment_sum(x, cu).isnan().tolist() == [False, True, False]
    assert _cuda_spans.segment_softmax(x, cu).isnan().sum() == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 1031])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mean", [False, True])
def test_scores_match_the_oracle(mean, rows, width, dtype):
    lengths = [1, 5, 2, 9, 1, 1, 40]
    cu, actions = cuts(lengths), sum(lengths)
    g = torch.Generator().manual_seed(width)
    hidden = torch.randn(actions, width + 3, generator=g).to(dtype)[:, 1 : 1 + width]
    weight = torch.randn(rows, width, generator=g).to(dtype)
    bias = torch.randn(rows, generator=g)
    head = torch.randn(5, 4, generator=g)
    states, targets = torch.randn(actions, 4, generator=g), torch.arange(actions) % 5
    shaping = {} if rows == 1 else {"shaping_gamma": 0.9, "cu_seq_spans": cuts([3, 1, 3])}
    mode = "mean" if mean else "sum"
    given = (states, head, targets, hidden, weight, cu)
    truth = oracle.airl_score(*given, disc_bias=bias, span_logp=mode, **shaping)
    shaped = {"shaping_gamma": None, "cu_seq_spans": None, **shaping}
    common = truth.logp.float(), cu, mean
    reward, f = _cuda_spans.span_scores(hidden, weight, bias, *common, "airl", **shaped)
    torch.testing.assert_close(f.double(), truth.f, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(reward.double(), truth.reward, rtol=1e-5, atol=2e-5)
    reward, f = _cuda_spans.span_scores(hidden, weight, None, *common, "logit", **shaped)
    assert torch.equal(reward, f)


@pytest.mark.parametrize("count", [1, 2, 700])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("airl", {"label_smoothing": 0.1, "temperature": 2.0}),
        ("logit", {}),
        ("wgan", {}),
    ],
)
def test_the_discriminator_matches_the_oracle(form, options, weighted, count):
    f, logp = 3 * values(count), values(count, seed=1) - 2
    is_expert = torch.arange(2 * count)[::2] % 6 == 0
    weight = values(count, seed=2).abs() + 0.1 if weighted else None
    leaf = f.double().requires_grad_()
    given = {"form": form, "weight": weight, **options}
    loss, stats = oracle.discriminator_loss(leaf, logp, is_expert, **given)
    (gradient,) = torch.autograd.grad(0.5 * loss, leaf)
    all_options = {"label_smoothing": 0.0, "temperature": 1.0, **options}
    arguments = (f, logp, is_expert, weight, form, *all_options.values())
    found, found_stats = _cuda_spans.discriminator_loss(*arguments)
    torch.testing.assert_close(found.double(), loss.detach(), rtol=1e-6, atol=1e-7)
    named = discriminator_loss.DiscriminatorStats(*found_stats.unbind())
    for name, expected in stats.items():
        value = getattr(named, name).item()
        assert value == pytest.approx(expected, rel=1e-6, nan_ok=True), name
    found = _cuda_spans.discriminator_gradient(torch.tensor(0.5), *arguments)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)


def test_extreme_logits_overflow_nothing():
    f, logp = torch.tensor([-900.0, 0.0, 900.0]), torch.zeros(3)
    is_expert = torch.tensor([True, False, True])
    arguments = (f, logp, is_expert, None, "airl", 0.0, 1.0)
    loss, _ = _cuda_spans.discriminator_loss(*arguments)
    truth, _ = oracle.discriminator_loss(f, logp, is_expert)
    assert loss.double().item() == pytest.approx(truth.item())
    assert _cuda_spans.discriminator_gradient(torch.tensor(1.0), *arguments).isfinite().all()


def test_nothing_at_all():
    none, cu = torch.empty(0), torch.zeros(1, dtype=torch.int32)
    assert len(_cuda_spans.segment_sum(none, cu)) == 0
    assert len(_cuda_spans.segment_softmax(none, cu)) == 0
    assert len(_cuda_spans.discounted_returns(none, cu, 0.9, False)) == 0
    arguments = (none, none, none.bool(), None, "airl", 0.0, 1.0)
    loss, stats = _cuda_spans.discriminator_loss(*arguments)
    assert loss == 0
    assert stats.isnan().all()
    assert len(_cuda_spans.discriminator_gradient(torch.tensor(1.0), *arguments)) == 0
