"""Tokens drawn by given numbers, against the distribution function in float64."""

import pytest
import torch

import airl_fast
from airl_fast.ops._draw import draw

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def served_by(request):
    with airl_fast.backend(request.param):
        yield request.param


def some(rows, vocab, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab, generator=generator)
    return logits, torch.rand(rows, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize(
    ("vocab", "scale"), [(1, 1.0), (18, 3.0), (511, 30.0), (513, 1.0), (5000, 3.0)]
)
def test_the_token_is_the_first_whose_sum_passes(vocab, scale, temperature):
    logits, u = some(400, vocab, scale)
    token, logp = draw(logits, u, temperature)
    log_probs = (logits.double() / temperature).log_softmax(-1)
    sums = torch.nn.functional.pad(log_probs.exp().cumsum(-1), (1, 0))
    below, above = (sums.gather(1, token[:, None] + i)[:, 0] for i in (0, 1))
    slack = 2e-6  # of sums of float32 probabilities
    assert (below - slack <= u).all()
    assert (u <= above + slack).all()
    expected = log_probs.gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, atol=2e-5, rtol=1e-5)
    assert (logp <= 0).all()


def test_a_token_of_probability_0_is_never_drawn():
    logits = torch.full((3000, 700), -torch.inf)
    logits[:, 515:520] = 0.0
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    token, logp = draw(logits, ends.repeat(1500), 1.0)
    assert set(token[::2].tolist()) == {515}
    assert set(token[1::2].tolist()) == {519}
    torch.testing.assert_close(logp, torch.full_like(logp, -1.6094379))


def test_large_logits_are_no_overflow():
    logits, u = some(50, 300, 1e4)
    token, logp = draw(logits, u, 1.0)
    assert torch.equal(token, logits.argmax(-1))
    assert (logp.abs() < 1e-6).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_no_log_prob_and_others_keep_theirs(value):
    logits, u = some(6, 600, 1.0)
    expected = draw(logits, u, 1.0)
    logits[3, 599] = value
    token, logp = draw(logits, u, 1.0)
    others = [0, 1, 2, 4, 5]
    assert logp[3].isnan()
    assert 0 <= token[3] < 600
    assert torch.equal(logp[others], expected[1][others])
    assert torch.equal(token[others], expected[0][others])


def test_a_row_does_not_depend_on_threads_or_strides():
    logits, u = some(300, 900, 2.0)
    expected = draw(logits, u, 0.8)
    torch.set_num_threads(2)
    try:
        wide = torch.cat([logits, logits], 1)[:, :900]
        found = draw(wide, u.repeat_interleave(2)[::2], 0.8)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
