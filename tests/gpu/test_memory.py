"""What operators over the head take on a GPU beside their results: a chunk of logits, at any N."""

import os
from importlib.util import find_spec

import pytest
import torch

from airl_fast import linear_logprob, linear_policy_loss
from airl_fast.ops import _gpu_head, _triton
from tests.stand_in import ENVIRONMENT

pytestmark = pytest.mark.skipif(
    ENVIRONMENT not in os.environ and find_spec("airl_fast._cuda") is None,
    reason="needs the CUDA kernels",
)

N, V = 300, 1000
ROW = 4 * 1024 + 16  # bytes of a row of logits, to the next multiple of 64, and its statistics
BUDGET = 31 * ROW
NUMBERS = 96 * N  # log-probs, coefficients, offsets


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(_gpu_head, "CHUNK_BYTES", BUDGET)
    monkeypatch.setenv("AIRL_FAST_BACKEND", "cuda")
    monkeypatch.setattr(_triton, "interpreted", lambda: False)  # it scales gradients in place


def tensors(dtype, width, ignored=False):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, width, generator=draw).to("cuda", dtype)
    weight = (torch.randn(V, width, generator=draw) / 8).to("cuda", dtype)
    targets = torch.randint(V, (N,), generator=draw)
    if ignored:
        targets[::3] = -100
    return hidden, weight, targets.cuda()


def peak(call):
    """Most bytes during a call, its results among them, beyond what there was before.

    On one thread: one of autograd's own may let go of the first call's graph during the second.
    """
    with torch.autograd.set_multithreading_enabled(False):
        call()  # whatever is made once is there
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scoring(dtype, ignored):
    hidden, weight, targets = tensors(dtype, 64, ignored)

    def call():
        with torch.no_grad():
            return linear_logprob(hidden, weight, targets, return_entropy=True)

    assert BUDGET / 2 < peak(call) <= BUDGET + NUMBERS


@pytest.mark.parametrize(
    ("dtype", "width", "importance", "rows", "swept", "rounded"),
    [
        (torch.float32, 64, "token", 31, 4, 0),
        (torch.float32, 64, "sequence", 31, 4, 0),
        (torch.bfloat16, 64, "token", 31, 4, 2),  # rounded when the chunk is gone
        (torch.bfloat16, 256, "token", 128, 2, 0),  # a larger chunk, for less than those 4
        (torch.bfloat16, 256, "sequence", 31, 4, 2),  # which might make more than four pieces
        (torch.bfloat16, 256, "frozen", 31, 0, 0),
    ],
)
def test_a_policy_loss_and_its_gradients(dtype, width, importance, rows, swept, rounded):
    """Bytes of an entry of d weight: while chunks are swept, and of its copy in another dtype."""
    hidden, weight, targets = tensors(dtype, width)
    advantages = torch.randn(N, device="cuda")
    cu_seqs = torch.arange(0, N + 1, 20, dtype=torch.int32, device="cuda")
    leaves = [hidden.requires_grad_()]
    if importance == "frozen":
        importance = "token"
    else:
        leaves.append(weight.requires_grad_())

    def call():
        loss, _ = linear_policy_loss(
            hidden, weight, targets, advantages, cu_seqs=cu_seqs, importance=importance
        )
        return torch.autograd.grad(loss, leaves)

    d_weight = V * width
    most = max(rows * ROW + swept * d_weight, (swept + rounded) * d_weight)
    most += hidden.nbytes + NUMBERS
    assert most - BUDGET / 2 < peak(call) <= most
