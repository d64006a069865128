"""No kernel leaves its buffers, whatever targets and offsets are; on a GPU the error comes late.

Memory around what a kernel is given holds a number of its own: a read of it would show in a result,
a write would change it. Triton's kernels run in its interpreter, the CUDA sources in the emulator
(tests/cuda/harness.cpp has both faults under the sanitizers too), the C++ ones as they are.
"""

import pytest
import torch

import airl_fast
from airl_fast import _C
from airl_fast.ops import (
    _cuda_head,
    _cuda_spans,
    _deferred,
    _gpu_head,
    _policy_terms,
    dispatch,
    segments,
)
from airl_fast.ops._gpu_rows import row_head
from airl_fast.ops.segments import address, check_offsets, cuts, found_owner
from tests import oracle
from tests.cuda.conftest import emulated, rows  # noqa: F401
from tests.kernels.conftest import device  # noqa: F401

GUARD = 12345.0
VOCAB = 70
STRANGE = [-1, -100, VOCAB, 2**32 + 3, 2**62, -(2**63)]  # 2**32 + 3 is 3 in 32 bits
OFFSETS = [
    [0, 5, 3, 12],
    [-7, 4, 8, 12],
    [0, 4, 8, 2**31 - 1],
    [5, 5, 5, 5],
    [-(2**31), 2**31 - 1, -1, 40],
]


def guarded(shape, fill=None):
    """A float32 tensor in the middle of memory full of GUARD, and that memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * 64,), GUARD)
    inside = memory[64 : 64 + size].view(shape)
    if fill is not None:
        inside.copy_(fill)
    return inside, memory


def untouched(memory, size):
    return bool((memory[:64] == GUARD).all() and (memory[64 + size :] == GUARD).all())


class Arrival:
    """Stands for the event of every report: they have arrived when the test says so."""

    def __init__(self):
        self.now = False

    def query(self):
        return self.now

    def synchronize(self):
        self.now = True


@pytest.fixture
def late(monkeypatch):
    """Checks leave reports on a CPU too, as on a GPU; none is left over."""
    arrival = Arrival()
    monkeypatch.setattr(_deferred, "defers", lambda where: True)
    for module in ("segments", "_policy_checks"):
        monkeypatch.setattr(f"airl_fast.ops.{module}.defers", lambda where: True)

    def send(found, words, error):
        _deferred._reports.append(_deferred._Report(arrival, found, words, error))

    monkeypatch.setattr(_deferred, "_send", send)
    yield arrival
    _deferred._reports.clear()


def logits_and_truth(targets):
    g = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(len(targets), VOCAB, generator=g)
    eye = torch.eye(VOCAB, dtype=torch.float64)
    safe = torch.where((targets >= 0) & (targets < VOCAB), targets, 0)
    return a, oracle.linear_logprob(a, eye, safe)[0]


def check_row_kernels(kernels, place):
    """Read, differentiate and policy: NaN on the strange rows, right on others, no guard hit."""
    targets = torch.tensor([3, *STRANGE, VOCAB - 1])
    good = torch.tensor([0, len(targets) - 1])
    a, truth = logits_and_truth(targets)
    targets, head, count = targets.to(place), row_head(None, 1.0, None, 1.0), len(targets)
    one = torch.ones(count, device=place)
    actions = _policy_terms.Actions(targets, targets, targets, one, None, None, one / count)
    loss = _policy_terms.ActionLoss(0.2, 0.2, None, 0.0, 0.0, False)

    def run(kind):
        logits, memory = guarded((count, VOCAB), a)
        out, results = guarded((6, count))
        logits, memory, out, results = (x.to(place) for x in (logits, memory, out, results))
        if place.type != "cpu":  # copies are apart: place them again
            logits = memory[64 : 64 + count * VOCAB].view(count, VOCAB)
            out = results[64 : 64 + 6 * count].view(6, count)
        stats = out[2:].view(count, 4)
        if kind == "policy":
            kernels.policy(logits, head, actions, loss, out[0], out[1], logits)
        else:
            kernels.read(logits, head, targets, out[0], out[1], stats)
            kept = stats if kind == "kept" else None
            kernels.differentiate(logits, head, targets, one, None, kept, logits)
        assert untouched(memory.cpu(), count * VOCAB)
        assert untouched(results.cpu(), 6 * count)
        return out[0].cpu(), logits.cpu()

    for kind in ("kept", "read again", "policy"):
        logp, gradient = run(kind)
        assert torch.allclose(logp[good].double(), truth[good], atol=1e-5), kind
        assert logp[1:-1].isnan().all(), kind
        assert gradient[1:-1].isnan().all(), kind
        assert gradient[good].isfinite().all(), kind


def test_triton_row_kernels_with_targets_out_of_range(device):  # noqa: F811
    from airl_fast.kernels.launch import RowConfig
    from airl_fast.kernels.rows import TritonRows

    check_row_kernels(TritonRows(RowConfig(32, 4)), device)


def test_cuda_row_kernels_with_targets_out_of_range(rows):  # noqa: F811
    check_row_kernels(rows, torch.device("cpu"))


def test_the_fused_triton_forward_with_targets_out_of_range(device):  # noqa: F811
    from airl_fast.kernels import linear_logprob as kernels
    from airl_fast.kernels.launch import DotConfig

    targets = torch.tensor([3, *STRANGE, VOCAB - 1])
    a, truth = logits_and_truth(targets)
    weight = torch.eye(VOCAB)
    logp = torch.full((len(targets),), GUARD, device=device)
    config = DotConfig(16, 32, 16, 1, 1, 4, 3)  # splits of one tile each
    call = (x.to(device) for x in (a, weight, targets))
    kernels.read_head(*call, row_head(None, 1.0, None, 1.0), None, logp, None, config)
    assert logp[1:-1].isnan().all()
    assert torch.allclose(logp[[0, -1]].double().cpu(), truth[[0, -1]], atol=1e-5)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_triton_segments_with_strange_offsets(offsets, device):  # noqa: F811
    from airl_fast.kernels import segments as kernels
    from airl_fast.kernels.discriminator import span_scores
    from airl_fast.kernels.launch import SegmentConfig

    cu = torch.tensor(offsets, dtype=torch.int32, device=device)
    x, memory = guarded((12,), torch.ones(12))
    config = SegmentConfig(2, 8, 4)
    for mode in ("sum", "mean", "last"):
        found = kernels.reduce(x.to(device), cu, mode, config)
        assert (found.isnan() | (found <= 12)).all(), mode  # no GUARD in it
    assert kernels.softmax(x.to(device), cu, config).shape == (12,)
    scanned = kernels.scan(x.to(device), cu, 1.0, False, config)
    assert scanned.shape == (12,)
    hidden, _ = guarded((12, 5), torch.ones(12, 5))
    weight = torch.ones(2, 5, device=device)
    ends = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    call = hidden.to(device), weight, None, -x.to(device), cu, False, "airl", 0.9, ends
    for found in span_scores(*call):
        assert (found.isnan() | (found.abs() <= 60)).all()
    assert untouched(memory, 12)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_cpp_kernels_refuse_offsets_before_they_touch_a_value(offsets):
    cu = torch.tensor(offsets, dtype=torch.int32)
    x, _ = guarded((12,), torch.ones(12))
    out, memory = guarded((12,))
    calls = {
        "segment_sum": (False, 1),
        "segment_last": (1,),
        "segment_softmax": (1,),
        "discounted_scan": (0.9, False, 1),
    }
    for name, options in calls.items():
        with pytest.raises(ValueError, match=r"from 0 to 12.*received others: check that both"):
            getattr(_C, name)(address(x), cuts(cu), *options, out.data_ptr())
    assert (memory == GUARD).all()


@pytest.mark.parametrize("offsets", [*OFFSETS, [0, 4, 8, 12]])
def test_offsets_to_work_with_are_inside_whatever_was_given(offsets, late):
    cu = torch.tensor(offsets, dtype=torch.int32)
    sound = check_offsets("op", "cu", cu, 12)
    assert sound.dtype == torch.int32
    assert sound[0] == 0
    assert sound[-1] == 12
    assert (sound.diff() >= 0).all()
    if offsets == [0, 4, 8, 12]:
        assert sound.tolist() == offsets
        _deferred.raise_failed(wait=True)
    else:
        with pytest.raises(ValueError, match=r"op: (expected cu to run|span \d of cu is empty)"):
            _deferred.raise_failed(wait=True)


def planted(targets):
    hidden, weight = torch.randn(len(targets), 6), torch.randn(VOCAB, 6)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.tensor(targets)


def check_the_error_comes_late(late):
    """A planted target: its row is NaN, the others are right, the next call raises."""
    hidden, weight, targets = planted([3, VOCAB, 5])
    logp = airl_fast.linear_logprob(hidden, weight, targets)
    safe = torch.tensor([3, 0, 5])
    truth = oracle.linear_logprob(hidden, weight, safe)[0].detach()
    assert logp.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(logp[::2].detach().double(), truth[::2], rtol=0, atol=1e-5)
    message = rf"targets\[1\] = {VOCAB} is outside .*tokenizer.*found on the GPU after the call"
    airl_fast.segment_sum(torch.ones(2), torch.tensor([0, 2], dtype=torch.int32))  # not there yet
    late.now = True
    with pytest.raises(ValueError, match=message):
        airl_fast.segment_sum(torch.ones(2), torch.tensor([0, 2], dtype=torch.int32))
    _deferred._reports.clear()
    late.now = False
    cu_seqs = torch.tensor([0, 3], dtype=torch.int32)
    call = hidden, weight, targets, torch.ones(3)
    loss, stats = airl_fast.linear_policy_loss(*call, cu_seqs=cu_seqs)
    assert stats.logp.isnan().tolist() == [False, True, False]
    loss.backward()
    assert hidden.grad[1].isnan().all()
    assert hidden.grad[::2].isfinite().all()
    with pytest.raises(ValueError, match=message):
        _deferred.raise_failed(wait=True)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(_gpu_head, "chunk_rows", lambda *sizes: 2)


@pytest.mark.usefixtures("small_chunks")
def test_a_target_out_of_range_raises_late_on_the_triton_backend(late):
    with airl_fast.backend("triton"):
        check_the_error_comes_late(late)


@pytest.mark.usefixtures("small_chunks")
def test_a_target_out_of_range_raises_late_on_the_cuda_backend(late, rows, emulated, monkeypatch):  # noqa: F811
    airl_fast.explain()  # imports all operators
    for op in dispatch._registry.values():
        if "cuda" in op:
            served = dispatch.Implementation(op["cuda"].function, dispatch.always)
            monkeypatch.setitem(op, "cuda", served)
    monkeypatch.setattr(_cuda_head, "rows", lambda: rows)
    monkeypatch.setattr(_cuda_head.HEAD, "_rows", lambda: rows)
    monkeypatch.setattr(_cuda_spans, "extension", lambda: emulated)
    monkeypatch.setattr(_cuda_spans, "place", lambda tensor: (0, 0))
    with airl_fast.backend("cuda"):
        check_the_error_comes_late(late)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_offsets_raise_late_and_gradients_stay_inside(offsets, late, monkeypatch):
    monkeypatch.setattr(  # as on a GPU
        segments, "spread", lambda x, cu, total: x.index_select(0, found_owner(cu, total))
    )
    cu = torch.tensor(offsets, dtype=torch.int32)
    for name in ("segment_sum", "segment_mean", "segment_last", "segment_softmax"):
        x = torch.ones(12, requires_grad=True)
        with airl_fast.backend("triton"):
            out = getattr(airl_fast, name)(x, cu)
            assert len(out) in (3, 12)
            out.sum().backward()
        assert x.grad.shape == (12,)
        with pytest.raises(ValueError, match=name):
            _deferred.raise_failed(wait=True)
        _deferred._reports.clear()
        late.now = False


def test_every_element_finds_a_span_whatever_the_offsets_are():
    """What gradients on a GPU are spread by: there nobody may have checked the offsets yet."""
    for offsets in OFFSETS:
        owner = found_owner(torch.tensor(offsets, dtype=torch.int32), 12)
        assert ((owner >= 0) & (owner < 3)).all()
    cu = torch.tensor([0, 3, 4, 12], dtype=torch.int32)
    assert found_owner(cu, 12).tolist() == [0] * 3 + [1] + [2] * 8


WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero")


@pytest.mark.usefixtures("late", "small_chunks")
def test_checks_on_a_gpu_wait_for_nothing(monkeypatch):
    """The one wait of a call over the head is for the number of rows that count."""
    hidden, weight, targets = (x.detach() for x in planted([3, 4, 5]))
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    seen = []
    for name in WAITS:
        real = getattr(torch.Tensor, name)

        def counted(self, *args, _real=real, _name=name, **kwargs):
            seen.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    monkeypatch.setattr(_deferred, "raise_failed", lambda **_: None)
    with airl_fast.backend("triton"):
        airl_fast.linear_logprob(hidden, weight, targets, return_entropy=True)
        airl_fast.linear_policy_loss(hidden, weight, targets, torch.ones(3), cu_seqs=cu)
        assert seen == ["nonzero", "nonzero"]
        seen.clear()
        airl_fast.segment_mean(torch.ones(3), cu)
        airl_fast.discounted_returns(torch.ones(3), cu, 0.9)
        expert = torch.tensor([True, False, True])
        airl_fast.discriminator_loss(torch.ones(3), torch.ones(3), expert)
        assert seen == []


def test_blocking_raises_where_the_call_is(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert _deferred.defers(cuda)
    assert not _deferred.defers(torch.device("cpu"))
    monkeypatch.setenv("AIRL_FAST_BLOCKING", "1")
    assert not _deferred.defers(cuda)
