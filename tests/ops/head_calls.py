"""Calls of linear_logprob for the tests: inputs, gradients at them, and plain torch beside it."""

import torch

from airl_fast import linear_logprob

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.3},
    "steep": {"temperature": 0.25, "logit_scale": 3.0},
    "all": {"temperature": 1.3, "softcap": 5.0, "logit_scale": 1.7},
}


def inputs(n, vocab, width=6, dtype=torch.float32, seed=0, ignored=0.25):
    """Hidden, weight, targets and bias; logits of a few units."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, targets, bias


def upstream(n, seed=1):
    return torch.randn(2, n, generator=torch.Generator().manual_seed(seed))


def results(function, tensors, wanted, **options):
    """logp and entropy, and the gradients at ``wanted`` for non-unit upstream gradients."""
    hidden, weight, targets, bias = tensors
    outputs = function(hidden, weight, targets, bias=bias, **options)
    ups = zip(upstream(len(hidden)), outputs, strict=True)
    grads = [g.to(o) for g, o in ups]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def fused(*args, **options):
    return linear_logprob(*args, return_entropy=True, **options)


def plain_torch(hidden, weight, targets, *, bias, temperature=1.0, softcap=None, logit_scale=1.0):
    """What one would write by hand, every step in the dtype of the inputs."""
    z = (hidden @ weight.T + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / temperature).log_softmax(-1)
    kept = targets != -100
    logp = log_p.gather(1, targets.where(kept, 0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp.where(kept, 0), entropy.where(kept, 0)


def assert_as_good_as_plain(got, naive, truth, dtype):
    """Each result errs at most twice as much as plain torch's, plus a few units of rounding."""
    for a, b, exact in zip(got, naive, truth, strict=True):
        assert a.shape == exact.shape
        if exact.numel():
            slack = 16 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
            bound = 2 * (b.double() - exact).abs().max().item() + slack
            assert (a.double() - exact).abs().max().item() <= bound
