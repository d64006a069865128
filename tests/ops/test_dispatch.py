"""A forced backend is forced in the backward too, in whatever thread autograd runs it."""

from threading import Thread

import pytest
import torch

import airl_fast
from airl_fast.ops import dispatch
from tests.ops import head_calls


def log_probs():
    hidden, weight, targets, bias = head_calls.inputs(5, 7)
    return airl_fast.linear_logprob(hidden, weight, targets, bias=bias).sum()


def adversary():
    f = torch.randn(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expert = torch.tensor([True, False, True, False])
    return airl_fast.discriminator_loss(f, torch.zeros(4), expert)[0]


def returns():
    x = torch.ones(3, requires_grad=True)
    return airl_fast.discounted_returns(x, torch.tensor([0, 3], dtype=torch.int32), 0.5).sum()


BACKWARDS = {
    "linear_logprob_backward": log_probs,
    "discriminator_gradient": adversary,
    "discounted_returns": returns,
}


def backward_elsewhere(loss):
    """Go backward in a thread that sees no ContextVar of this one, as CUDA's threads do."""
    failures = []

    def run():
        try:
            loss.backward()
        except RuntimeError as error:
            failures.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    return failures


@pytest.mark.parametrize("op", BACKWARDS)
def test_backward_is_served_by_the_backend_of_its_forward(op, monkeypatch):
    with airl_fast.backend("reference"):
        loss = BACKWARDS[op]()
    served = []
    pick = dispatch.serving

    def watched(asked, *tensors):
        chosen = pick(asked, *tensors)
        served.append((asked, chosen))
        return chosen

    monkeypatch.setattr(dispatch, "serving", watched)
    assert backward_elsewhere(loss) == []
    assert (op, "reference") in served


@pytest.mark.parametrize("op", BACKWARDS)
def test_a_backend_that_cannot_serve_the_backward_raises_there_too(op, monkeypatch):
    with airl_fast.backend("reference"):
        loss = BACKWARDS[op]()
    monkeypatch.delitem(dispatch._registry[op], "reference")
    (failure,) = backward_elsewhere(loss)
    assert "'reference' was forced but cannot serve" in str(failure)


def test_without_a_forced_backend_the_one_in_force_at_the_backward_counts(monkeypatch):
    loss = log_probs()
    monkeypatch.delitem(dispatch._registry["linear_logprob_backward"], "reference")
    with airl_fast.backend("reference"), pytest.raises(RuntimeError, match="was forced"):
        loss.backward()
