"""Calls of linear_policy_loss for the tests: inputs, and the loss composed from linear_logprob."""

import torch

from airl_fast import linear_logprob
from tests import oracle

# A sequence of one action, an empty one, one longer than a small chunk, one ignored throughout.
LENGTHS = (1, 3, 0, 9, 2, 4)
HEAD = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 1.7}
UPSTREAM = -2.5


def inputs(lengths=LENGTHS, vocab=13, width=6, dtype=torch.float32, seed=0, ignored=0.2):
    """The tensors of a call, by name; ratios that leave the clip range on both sides."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    hidden, weight = torch.randn(n, width, generator=g), torch.randn(vocab, width, generator=g)
    bias = torch.randn(vocab, generator=g)
    targets = torch.randint(0, vocab, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    if len(lengths) > 1 and ignored > 0:
        targets[sum(lengths[:-2]) : sum(lengths[:-1])] = -100
    logp, _ = oracle.linear_logprob(hidden, weight, targets, bias=bias)
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "targets": targets,
        "advantages": torch.randn(n, generator=g),
        "cu_seqs": torch.tensor([0, *lengths]).cumsum(0).int(),
        "old_logp": logp.float() + 0.5 * torch.randn(n, generator=g),
        "ref_logp": logp.float() + 0.5 * torch.randn(n, generator=g),
        "bias": bias.to(dtype).requires_grad_(),
    }


def leaves(tensors):
    return [tensors["hidden"], tensors["weight"], tensors["bias"]]


def composed(
    hidden,
    weight,
    targets,
    advantages,
    *,
    cu_seqs,
    old_logp=None,
    ref_logp=None,
    clip_low=0.2,
    clip_high=0.2,
    delta=None,
    beta=0.0,
    entropy_coef=0.0,
    importance="token",
    aggregation="token",
    normaliser=None,
    **head,
):
    """The loss written with linear_logprob and autograd."""
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, **head)
    sequence = torch.arange(len(cu_seqs) - 1).repeat_interleave(cu_seqs.diff())
    kept = targets != -100
    member = (sequence[:, None] == torch.arange(len(cu_seqs) - 1)) & kept[:, None]  # [N, B]
    member = member[:, member.any(0)].float()
    mean = member / member.sum(0)
    log_rho = logp - (logp.detach() if old_logp is None else old_logp)
    if importance == "sequence":
        log_rho = member @ (mean.T @ log_rho)
    rho = log_rho.exp()
    bounded = rho.clamp(1 - clip_low, 1 + clip_high)
    rho = rho if delta is None else rho.clamp(max=delta)
    loss = -torch.minimum(rho * advantages, bounded * advantages)
    if beta:
        loss = loss + beta * ((ref_logp - logp).exp() - (ref_logp - logp) - 1)
    loss = loss - entropy_coef * entropy
    if aggregation == "token":
        return loss[kept].mean()
    return (mean.T @ loss).mean() if aggregation == "sequence" else loss[kept].sum() / normaliser


def gradients(loss, wanted):
    return torch.autograd.grad(loss * UPSTREAM, wanted)
