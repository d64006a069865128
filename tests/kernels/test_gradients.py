"""How gradients of the head wait and add up on a GPU: bfloat16, float32, and the loss's own."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import airl_fast
from airl_fast import linear_policy_loss
from airl_fast.ops import _gpu_head, _triton
from airl_fast.ops._head import LinearHead
from tests import oracle
from tests.kernels.test_head import on
from tests.ops.head_calls import (
    HEADS,
    assert_as_good_as_plain,
    fused,
    inputs,
    plain_torch,
    results,
)

MIB = 2**20
PLAIN_HEAD = (None, 1.0, None, 1.0)  # no bias, temperature 1, no soft cap, scale 1


def sweep(rows, vocab, dtype=torch.bfloat16, width=8, kept=None, narrow=True):
    hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(vocab, width, dtype=dtype)
    kept = torch.arange(rows) if kept is None else kept
    head, needs = LinearHead(weight, *PLAIN_HEAD), (True, True, True)
    return _gpu_head.GPUHead(hidden, kept, head, _triton.rows(), needs, narrow=narrow)


@pytest.mark.parametrize("rows", [1, 100, 128, 129, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_chunk_stays_within_its_budget_and_wastes_no_tile_of_a_product(rows, dtype, monkeypatch):
    monkeypatch.setattr(_gpu_head, "CHUNK_BYTES", MIB)
    found = sweep(rows, 500, dtype)
    most = MIB // (4 * 512 + 16)
    assert found.limit * (4 * 512 + 16) <= MIB
    assert found.limit in (min(rows, most), found.limit // 128 * 128)
    assert -(-rows // found.limit) == -(-rows // most)  # no more chunks than the budget asks for


def test_a_chunk_leaves_room_for_copies_of_its_rows(monkeypatch):
    monkeypatch.setattr(_gpu_head, "CHUNK_BYTES", MIB)
    kept = torch.arange(0, 4000, 2)  # gathered, and their gradients scattered
    logits = 4 * 64 + 16
    assert sweep(4000, 60, width=1000, kept=kept).limit == MIB // (logits + (2 + 4) * 1000)
    assert sweep(4000, 60, width=1000).limit == 2048  # of 3855


@pytest.mark.parametrize(
    ("rows", "width", "limit"),
    [
        (1900, 8, 508),  # four within the budget already
        (2100, 8, 508),  # five: a larger chunk would take more than the float32 gradient
        (2100, 300, 640),  # four, and less: 640 - 504 rows against 600 KB
        (9000, 300, 508),  # eighteen: too many rows
        (9000, 4000, 2304),  # four: 1,796 rows against 8 MB
    ],
)
def test_a_chunk_is_larger_where_that_is_less_than_a_float32_gradient(
    rows, width, limit, monkeypatch
):
    monkeypatch.setattr(_gpu_head, "CHUNK_BYTES", MIB)
    found = sweep(rows, 500, width=width)
    more = (found.limit - MIB // (4 * 512 + 16)) * (4 * 512 + 16)
    assert more <= 4 * 500 * width
    assert found.limit == limit
    exact = sweep(rows, 500, width=width, narrow=False)
    assert exact.limit * (4 * 512 + 16) <= MIB


@pytest.mark.parametrize(
    ("dtype", "chunks", "narrow", "stored"),
    [
        (torch.bfloat16, 4, True, (torch.bfloat16, torch.bfloat16)),
        (torch.bfloat16, 5, True, (torch.bfloat16, torch.float32)),
        (torch.bfloat16, 1, False, (torch.float32, torch.float32)),
        (torch.float16, 1, True, (torch.float32, torch.float32)),
        (torch.float32, 1, True, (torch.float32, torch.float32)),
    ],
)
def test_only_bfloat16_adds_up_in_itself_and_only_a_few_times(dtype, chunks, narrow, stored):
    found = sweep(10, 20, dtype, narrow=narrow)
    found.begin(chunks)
    assert (found.hidden.dtype, found.weight.dtype) == stored
    assert found.bias.dtype == torch.float32


@pytest.mark.usefixtures("triton_backend", "poisoned")
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_many_additions_are_as_good_as_plain_torch(head, rows, logits, device, monkeypatch):
    """16, 4 and 1 chunks of 16 rows; chunks of bfloat16 logits are plain torch's own."""
    monkeypatch.setattr(_gpu_head, "chunk_rows", lambda *sizes: rows)
    monkeypatch.setattr(_gpu_head, "LOGITS", logits)
    tensors = on(device, *inputs(16, 203, width=24, dtype=torch.bfloat16, ignored=0))
    wanted = [tensors[0], tensors[1], tensors[3]]
    got = results(fused, tensors, wanted, **HEADS[head])
    naive = results(plain_torch, tensors, wanted, **HEADS[head])
    truth = results(oracle.linear_logprob, tensors, wanted, **HEADS[head])
    assert_as_good_as_plain(got, naive, truth, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 77, 4096, 3 * 4096 + 5])
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0, 0.0])
def test_a_gradient_is_scaled_where_it_lies(factor, count, dtype, device, monkeypatch):
    """By two programs, which take turns. (The interpreter cuts where a GPU rounds.)"""
    from airl_fast.kernels import scaling

    monkeypatch.setattr(scaling, "_PROGRAMS", 2)
    memory = torch.randn(count + 8, generator=torch.Generator().manual_seed(0))
    memory = memory.to(device, dtype)
    before = memory.clone()
    scaling.scale(memory[:count], torch.tensor(factor, device=device))
    exact = before[:count].double() * torch.tensor(factor).double()
    bound = {"rtol": 0 if dtype == torch.float32 else torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(memory[:count], exact.float().to(dtype), **bound)
    assert factor != 1 or torch.equal(memory, before)
    assert torch.equal(memory[count:], before[count:])


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(upstream, device):
    hidden, weight, targets, bias = on(device, *inputs(9, 50, ignored=0))
    cu_seqs = torch.tensor([0, 9], dtype=torch.int32, device=device)
    advantages = torch.linspace(-1, 1, 9, device=device)
    call = (hidden, weight, targets, advantages)
    loss, _ = linear_policy_loss(*call, bias=bias, cu_seqs=cu_seqs)
    exact, _ = oracle.policy_loss(*call, bias=bias, cu_seqs=cu_seqs)
    wanted = hidden, weight, bias
    truth = torch.autograd.grad(exact, wanted, torch.tensor(upstream, device=device).double())
    given = torch.tensor(upstream, device=device)
    for kept in (True, True, False):
        got = torch.autograd.grad(loss, wanted, given, retain_graph=kept)
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_gradients_are_scaled_in_place_by_triton_alone(device):
    gradient = torch.ones(3, device=device)
    with airl_fast.backend("triton"):
        assert _triton.serves_in_place(gradient)
        assert not _triton.serves_in_place(gradient.double())
    with airl_fast.backend("reference"):
        assert not _triton.serves_in_place(gradient)


def test_gradients_that_wait_in_bfloat16_are_not_widened(monkeypatch):
    """As on a GPU, where a float32 copy of one of [V, D] is what this is to save."""

    class Copies(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and out.ndim == 2:
                self.seen += ((args[0].dtype, out.dtype, tuple(out.shape)),)
            return out

    narrow = lambda x, dtype: dtype if x is None else x.dtype  # noqa: E731
    monkeypatch.setattr("airl_fast.ops.linear_policy_loss.gradient_dtype", narrow)
    hidden, weight, targets, _ = inputs(9, 50, dtype=torch.bfloat16, ignored=0)
    cu_seqs = torch.tensor([0, 9], dtype=torch.int32)
    with Copies() as copies:
        loss, _ = linear_policy_loss(hidden, weight, targets, torch.ones(9), cu_seqs=cu_seqs)
        loss.backward()
    assert (torch.bfloat16, torch.float32, (50, 6)) not in copies.seen
    assert weight.grad.dtype == torch.bfloat16
