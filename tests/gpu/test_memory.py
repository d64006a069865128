"""What operators over the head take on a GPU beside their results: a chunk of logits, at any N."""

import pytest
import torch

from airl_fast import linear_logprob, linear_policy_loss
from airl_fast.ops import _gpu_head, _triton

N, V, D = 300, 1000, 64
BUDGET = 128 * 1024  # 31 rows of logits: a tenth of what all would take
ROWS = 64 * N  # of numbers per row: log-probs, coefficients, offsets


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(_gpu_head, "CHUNK_BYTES", BUDGET)
    monkeypatch.setenv("AIRL_FAST_BACKEND", "cuda")
    monkeypatch.setattr(_triton, "interpreted", lambda: False)  # it scales gradients in place


def tensors(dtype, ignored=False):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=draw).to("cuda", dtype)
    weight = (torch.randn(V, D, generator=draw) / 8).to("cuda", dtype)
    targets = torch.randint(V, (N,), generator=draw)
    if ignored:
        targets[::3] = -100
    return hidden, weight, targets.cuda()


def extra(call):
    """Most bytes during a call, beyond what there was before and what it leaves behind."""
    kept = call()  # whatever is made once is there
    del kept
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    left = torch.cuda.memory_allocated() - before
    taken = torch.cuda.max_memory_allocated() - before - left
    del kept
    return taken


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scoring(dtype, ignored):
    hidden, weight, targets = tensors(dtype, ignored)

    def call():
        with torch.no_grad():
            return linear_logprob(hidden, weight, targets, return_entropy=True)

    assert extra(call) <= BUDGET + ROWS


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_policy_loss_and_its_gradients(dtype, frozen):
    """Of a bfloat16 weight a float32 gradient, or the larger chunk that takes less, more."""
    hidden, weight, targets = tensors(dtype)
    advantages = torch.randn(N, device="cuda")
    cu_seqs = torch.tensor([0, 100, N], dtype=torch.int32, device="cuda")
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])

    def call():
        loss, _ = linear_policy_loss(hidden, weight, targets, advantages, cu_seqs=cu_seqs)
        return torch.autograd.grad(loss, leaves)

    wide = 4 * V * D if dtype == torch.bfloat16 and not frozen else 0
    assert extra(call) <= BUDGET + wide + ROWS
