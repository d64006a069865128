"""Tensors in a CPU's memory are served as ever, whatever torch's default device is."""

import torch

import airl_fast
from airl_fast.attention import packed_attention
from airl_fast.ops._draw import draw
from airl_fast.packing import Trace, pack


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT, VALUES = numbers(300, 64), numbers(500, 64, seed=1), numbers(300, seed=2)
TARGETS = torch.arange(300)
CU = torch.tensor([0, 100, 300], dtype=torch.int32)
BATCH = pack([Trace(prompt=(1, 2, 3), completion=(4,) * 6, span_lengths=(6,))] * 2)
HEADS = numbers(3, 1, 4, 15, 8, seed=3).unbind()
UNIFORM = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of_the_head(dtype, frozen):
    hidden = HIDDEN.to(dtype).requires_grad_()
    weight = WEIGHT.to(dtype).requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, weight]
    logp, entropy = airl_fast.linear_logprob(hidden, weight, TARGETS, return_entropy=True)
    loss, _ = airl_fast.linear_policy_loss(hidden, weight, TARGETS, VALUES, cu_seqs=CU)
    chosen = airl_fast.linear_logprob(hidden, weight, TARGETS)
    for result in (logp, entropy, chosen, loss):
        yield result
        yield from torch.autograd.grad(result.sum(), wanted, retain_graph=True)
    scored = airl_fast.airl_score(
        hidden.detach(), weight.detach(), TARGETS, hidden.detach(), weight.detach()[:1], CU
    )
    yield from scored


def of_spans():
    x = VALUES.clone().requires_grad_()
    for operator in (
        airl_fast.segment_sum,
        airl_fast.segment_mean,
        airl_fast.segment_last,
        airl_fast.segment_softmax,
        lambda x, cu: airl_fast.discounted_returns(x, cu, 0.9),
        lambda x, cu: airl_fast.discriminator_loss(x, VALUES - 1, VALUES > 0)[0],
    ):
        result = operator(x, CU)
        yield result
        yield from torch.autograd.grad(result.square().sum(), x)


def of_models():
    q, k, v = (x.clone().requires_grad_() for x in HEADS)
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, packed_batch=BATCH)
    yield out
    yield from torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    yield from torch.autograd.grad(
        packed_attention(torch.nn.Identity(), q, k, v, None, packed_batch=BATCH)[0].sum(), (q, k, v)
    )
    yield from draw(HIDDEN, UNIFORM, 0.7)


def everything():
    results = [*of_spans(), *of_models()]
    for dtype in (torch.float32, torch.bfloat16):
        for frozen in (False, True):
            results += of_the_head(dtype, frozen)
    return results


def test_the_default_device_changes_nothing():
    expected = everything()
    with torch.device("meta"):
        found = everything()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
