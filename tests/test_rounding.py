"""What rounding does to the head's gradients, beside what rounding.py says it can do."""

import pytest
import torch

from airl_fast import backend, linear_policy_loss
from airl_fast.ops._head import LinearHead
from airl_fast.rounding import gradient_rounding
from tests import oracle

BETA, ENTROPY, N, D, V = 0.1, 0.02, 48, 24, 300


def confident(seed, level):
    """A head, states near the words they predict, and what the loss takes; float32."""
    torch.manual_seed(seed)
    weight = torch.randn(V, D) + torch.randn(D)  # words have much in common, as trained ones do
    targets = torch.randint(V, (N,))
    hidden = level * (weight[targets] + 0.3 * torch.randn(N, D)) / D
    targets[::7] = torch.randint(V, (len(targets[::7]),))  # and some are surprising
    with torch.no_grad():
        logp = oracle.linear_logprob(hidden, weight, targets, temperature=0.7)[0].float()
    given = {"advantages": torch.randn(N), "old_logp": logp, "ref_logp": logp - 0.2}
    return hidden, weight, targets, given


def gradients(loss, hidden, weight, *arguments, **given):
    """Those of a loss at hidden and weight, [N, D] and [V, D]."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss(*leaves, *arguments, **given)[0].backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("level", [2, 10, 40])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_errs_by_no_more(name, level, kl):
    hidden, weight, targets, given = confident(0, level)
    if not kl:  # on policy: where a sample is certain, the gradient is what rounding leaves
        given = {"advantages": given["advantages"]}
    given |= {"cu_seqs": torch.tensor([0, N], dtype=torch.int32), "temperature": 0.7}
    given |= {"entropy_coef": ENTROPY, "beta": BETA * kl}
    with backend(name):
        got = gradients(linear_policy_loss, hidden, weight, targets, **given)
    want = gradients(oracle.policy_loss, hidden.double(), weight.double(), targets, **given)
    of_logp = given["advantages"].abs() + kl * BETA * (1 + torch.tensor(-0.2).exp())
    rounding = gradient_rounding(
        hidden, LinearHead(weight, temperature=0.7), targets, of_logp / N, ENTROPY / N
    )
    for found, right, floor in zip(got, want, rounding, strict=True):
        difference = (found - right).norm(dim=1)
        assert (difference <= 1e-4 * right.norm(dim=1) + floor).all()
        if level == 2:  # of samples that are not certain it is next to nothing
            assert floor.max() < 1e-4 * right.norm(dim=1).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [2, 10])
def test_products_in_half_precision_err_by_no_more(level, dtype):
    hidden, weight, targets, given = confident(1, level)
    hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()
    weighed = given["advantages"].double()[:, None]
    g = weighed * (oracle.head_logits(hidden, weight).softmax(1) - torch.eye(V)[targets])
    off = (g * 2**10).to(dtype).double() / 2**10 - g  # clear of float16's smallest numbers
    rounding = gradient_rounding(
        hidden.to(dtype),
        LinearHead(weight.to(dtype)),
        targets,
        given["advantages"].abs(),
        products=dtype,
    )
    for found, floor in ((off @ weight, rounding.hidden), (off.T @ hidden, rounding.weight)):
        assert (found.norm(dim=1) <= floor).all()
        assert (found.norm(dim=1) > 0.01 * floor).any()


def test_a_chunk_of_rows_at_a_time(monkeypatch):
    hidden, weight, targets, given = confident(2, 5)
    arguments = hidden, LinearHead(weight), targets, given["advantages"].abs()
    whole = gradient_rounding(*arguments)
    monkeypatch.setattr("airl_fast.rounding.chunk_rows", lambda vocab: 7)
    for got, want in zip(gradient_rounding(*arguments), whole, strict=True):
        torch.testing.assert_close(got, want)
