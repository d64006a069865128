"""What the head's operators cost: matrix products and memory, counted by the profiler."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from airl_fast import linear_logprob, linear_policy_loss
from airl_fast.ops import _cpu_gradients, _cpu_head, _head
from tests.ops import head_calls, policy_loss_calls

pytestmark = pytest.mark.usefixtures("served_by")

FACTORS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}


def multiplications(run):
    """Products of two numbers in the matrix products that ``run`` does, however they are cut."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    work = 0
    for event in seen.key_averages(group_by_input_shape=True):
        if event.key in FACTORS:
            (m, k), (_, n) = (event.input_shapes[i] for i in FACTORS[event.key])
            work += event.count * m * k * n
    return work


def memory(run):
    """Peak of live bytes above the start, and the largest allocation, while ``run`` runs."""
    run()  # leaves gradients in place, and out of the account
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, max(event.nbytes() for event in events)


def test_backward_computes_only_what_is_required():
    hidden, weight, targets, _ = head_calls.inputs(9, 13)

    def run():
        linear_logprob(hidden, weight, targets).sum().backward()

    one = int((targets != -100).sum()) * 13 * 6
    assert multiplications(run) == 4 * one  # logits, logits again, d hidden, d weight
    weight.requires_grad_(False)
    assert multiplications(run) == 3 * one


@pytest.mark.parametrize("head", ["plain", "all"])
def test_log_probs_never_hold_a_matrix_of_logits(head, served_by, monkeypatch):
    n, vocab, rows = 640, 1031, 16
    monkeypatch.setattr(_head, "CHUNK_BYTES", 4 * vocab * rows)
    hidden, weight, targets, bias = head_calls.inputs(n, vocab)
    options = head_calls.HEADS[head]

    def run():
        logp, entropy = head_calls.fused(hidden, weight, targets, bias=bias, **options)
        (logp + entropy).sum().backward()

    peak, largest = memory(run)
    chunk = 4 * vocab * rows
    inputs_bytes = 4 * (hidden.numel() + weight.numel() + 2 * vocab)
    assert largest <= chunk
    buffers = 1 if served_by == "cpu" else 3 if "softcap" in options else 2
    assert peak <= buffers * chunk + 4 * inputs_bytes
    assert 4 * n * vocab > 5 * peak


def test_chunk_rows_states_its_budget(served_by):
    if served_by == "cpu":
        assert _cpu_gradients.chunk_rows(151_936, 0) == 220
        assert _cpu_gradients.chunk_rows(49_152, 2 * 576) == 667
        assert _cpu_gradients.chunk_rows(10**9, 0) == 1
        for shape in ((2048, 49_152, 576), (10**6, 128_256, 2048), (1, 10**9, 1), (9, 7, 10**9)):
            (rows, columns), (count, vocab, width) = _cpu_head.tile_shape(*shape), shape
            assert 1 <= rows <= count
            assert 1 <= columns <= vocab
            assert max(rows * columns, rows * width, columns * width) <= max(2**22, width)
        return
    assert _head.chunk_rows(151_936) * 151_936 * 4 <= 128 * 2**20
    assert _head.chunk_rows(151_936) == 220
    assert _head.chunk_rows(10**9) == 1


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_policy_loss_takes_three_matrix_products_in_all(importance):
    tensors = policy_loss_calls.inputs()

    def run():
        loss, _ = linear_policy_loss(**tensors, importance=importance, entropy_coef=0.1)
        if loss.requires_grad:
            loss.backward()

    one = int((tensors["targets"] != -100).sum()) * 13 * 6
    assert multiplications(run) == 3 * one
    tensors["weight"].requires_grad_(False)
    assert multiplications(run) == 2 * one
    with torch.no_grad():
        assert multiplications(run) == one


def test_only_a_sequence_longer_than_a_chunk_is_read_twice(monkeypatch):
    monkeypatch.setattr(_head, "CHUNK_BYTES", 4 * 13 * 5)
    tensors = policy_loss_calls.inputs((2, 3, 4, 1, 7), ignored=0)  # the longest is read twice

    def run():
        linear_policy_loss(**tensors, importance="sequence")[0].backward()

    row = 13 * 6
    assert multiplications(run) == (3 * 17 + 7) * row
    tensors = policy_loss_calls.inputs((2, 3, 4, 1), ignored=0)
    assert multiplications(run) == 3 * 10 * row


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_policy_loss_never_holds_a_matrix_of_logits(importance, served_by, monkeypatch):
    vocab, rows = 1031, 16
    chunk = 4 * vocab * rows
    monkeypatch.setattr(_head, "CHUNK_BYTES", chunk)
    tensors = policy_loss_calls.inputs((300, 10, 5, 325), vocab=vocab)
    size = 4 * sum(t.numel() for t in tensors.values())

    def run():
        loss, _ = linear_policy_loss(**tensors, importance=importance, entropy_coef=0.1)
        loss.backward()

    peak, largest = memory(run)
    assert largest <= chunk
    assert peak <= (1 if served_by == "cpu" else 2) * chunk + 4 * size
    assert 4 * 640 * vocab > 5 * peak
