"""Segments, scans and the discriminator on the Triton backend, against the oracle."""

import pytest
import torch

import airl_fast
from airl_fast.ops import _triton
from tests import oracle

OFFSETS = {"one": [0, 1], "short": [0, 1, 4, 5, 9], "long": [0, 40, 41, 150], "many": [*range(71)]}
CONFIGS = [(4, 16), (1, 32)]


def batch(name, device, dtype=torch.float32):
    cu = torch.tensor(OFFSETS[name], dtype=torch.int32)
    x = torch.randn(int(cu[-1]), generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype), cu.to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OFFSETS)
def test_segments(name, dtype, device):
    from airl_fast.kernels import segments
    from airl_fast.kernels.launch import SegmentConfig

    x, cu = batch(name, device, dtype)
    for rows, columns in CONFIGS:
        config = SegmentConfig(rows, columns, 4)
        for mode in ("sum", "mean", "last"):
            exact = getattr(oracle, f"segment_{mode}")(x, cu)
            got = segments.reduce(x, cu, mode, config)
            assert torch.allclose(got.double(), exact, rtol=1e-7)
        p = segments.softmax(x, cu, config)
        assert torch.allclose(p.double(), oracle.segment_softmax(x, cu), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("name", ["short", "long"])
def test_scan_in_both_directions(name, gamma, device):
    from airl_fast.kernels import segments
    from airl_fast.kernels.launch import SegmentConfig

    x, cu = batch(name, device)
    turned = (cu[-1] - cu).flip(0)
    exact = oracle.discounted_returns(x, cu, gamma)
    forwards = oracle.discounted_returns(x.flip(0), turned, gamma).flip(0)
    for rows, columns in CONFIGS:
        config = SegmentConfig(rows, columns, 4)
        got = segments.scan(x, cu, gamma, False, config)
        assert torch.allclose(got.double(), exact, rtol=1e-6, atol=1e-7)
        got = segments.scan(x, cu, gamma, True, config)
        assert torch.allclose(got.double(), forwards, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("triton_backend")
def test_public_operators_and_their_gradients(device):
    x, cu = batch("long", device)
    x.requires_grad_()
    calls = dict.fromkeys(("segment_sum", "segment_mean", "segment_last"), ())
    for name, more in {**calls, "segment_softmax": (), "discounted_returns": (0.95,)}.items():
        got, exact = (getattr(m, name)(x, cu, *more) for m in (airl_fast, oracle))
        up = torch.randn(len(got), generator=torch.Generator().manual_seed(1)).to(device)
        pair = [torch.autograd.grad(y, x, up.to(y.dtype))[0] for y in (got, exact)]
        assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-6), name
        assert torch.allclose(*pair, rtol=1e-5, atol=1e-6), name


@pytest.mark.usefixtures("triton_backend")
def test_a_value_that_is_not_finite_stays_in_its_segment(device):
    x, cu = batch("short", device)
    x[2] = float("nan")
    for name in ("segment_sum", "segment_mean", "segment_softmax"):
        bad = getattr(airl_fast, name)(x, cu).isnan()
        expected = [1, 2, 3] if len(bad) == len(x) else [1]
        assert bad.nonzero().squeeze(1).tolist() == expected


@pytest.mark.usefixtures("triton_backend", "poisoned")
@pytest.mark.parametrize("form", ["airl", "logit", "wgan"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spans", [7, 1500])
def test_discriminator_loss(form, weighted, spans, device):
    g = torch.Generator().manual_seed(0)
    f = (4 * torch.randn(spans, generator=g)).to(device).requires_grad_()
    logp = (-3 * torch.rand(spans, generator=g)).to(device).requires_grad_()
    is_expert = (torch.rand(spans, generator=g) > 0.6).to(device)
    options = {"form": form, "weight": torch.rand(spans, generator=g).to(device)}
    options |= {} if form == "wgan" else {"label_smoothing": 0.1, "temperature": 1.7}
    if not weighted:
        del options["weight"]
    loss, stats = airl_fast.discriminator_loss(f, logp, is_expert, **options)
    exact, named = oracle.discriminator_loss(f, logp, is_expert, **options)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-6)
    for name, value in named.items():
        assert getattr(stats, name).item() == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert stats.mean_f_expert.item() == pytest.approx(f[is_expert].mean().item(), rel=1e-5)
    assert stats.mean_f_policy.item() == pytest.approx(f[~is_expert].mean().item(), rel=1e-5)
    wanted = (f, logp) if form == "airl" else (f,)
    pairs = [torch.autograd.grad(y, wanted) for y in (loss, exact)]
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("is_expert", [[], [True, True], [False]])
def test_discriminator_loss_of_one_class_or_none(is_expert, device):
    y = torch.tensor(is_expert, dtype=torch.bool, device=device)
    f, logp = torch.ones(len(y), device=device), torch.zeros(len(y), device=device)
    for form in ("airl", "wgan"):
        loss, stats = airl_fast.discriminator_loss(f, logp, y, form=form)
        exact, named = oracle.discriminator_loss(f, logp, y, form=form)
        assert loss.item() == pytest.approx(exact.item())
        assert stats.accuracy.item() == pytest.approx(named["accuracy"], nan_ok=True)


@pytest.mark.usefixtures("triton_backend", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_span_scores(rows, dtype, device):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 11, generator=g).to(device, dtype)
    weight = torch.randn(60, 11, generator=g).to(device, dtype)
    targets = torch.randint(0, 60, (23,), generator=g).to(device)
    disc_hidden = torch.randn(23, 1033, generator=g).to(device, dtype)
    disc_weight = torch.randn(rows, 1033, generator=g).to(device, dtype)
    call = hidden, weight, targets, disc_hidden, disc_weight
    cu = torch.tensor([0, 1, 9, 10, 20, 23], dtype=torch.int32, device=device)
    options = {"disc_bias": torch.arange(1.0, rows + 1, device=device)}
    if rows == 2:
        ends = torch.tensor([0, 1, 5], dtype=torch.int32, device=device)
        options |= {"shaping_gamma": 0.9, "cu_seq_spans": ends}
    for span_logp, form in (("sum", "airl"), ("mean", "airl"), ("sum", "logit")):
        got = airl_fast.airl_score(*call, cu, span_logp=span_logp, form=form, **options)
        exact = oracle.airl_score(*call, cu, span_logp=span_logp, form=form, **options)
        for a, b in zip(got, exact, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("triton_backend")
def test_a_language_model_head_is_composed(device):
    g = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(9, 5, generator=g).to(device) for _ in range(2))
    weight = torch.randn(20, 5, generator=g).to(device)
    targets = torch.randint(0, 20, (9,), generator=g).to(device)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    options = {"disc_head": "lm", "disc_scale": 0.5, "disc_bias": 0.1}
    got = airl_fast.airl_score(hidden, weight, targets, other, weight, cu, **options)
    exact = oracle.airl_score(hidden, weight, targets, other, weight, cu, **options)
    assert torch.allclose(got.reward.double(), exact.reward, atol=1e-5)


def test_every_operator_but_the_grouping_has_the_backend():
    table = airl_fast.explain()
    for row in table.rows:
        missing = row.refused.get("triton") == "not implemented"
        assert missing == (row.op in ("group_advantages", "linear"))  # the latter is a CPU's alone
    assert _triton.serves is not None
