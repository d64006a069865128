"""The sharded head against the float64 oracle of the whole one, in two and three processes.

All processes are started once, run every case (vocab_parallel_worker.py) and write what came out.
"""

import re

import pytest
import torch

import airl_fast
from airl_fast import vocab_parallel_linear_logprob
from airl_fast.ops._head import LinearHead
from airl_fast.ops._vocab_shard import forward_for, read_shard
from tests import oracle
from tests.ops import vocab_parallel_worker as worker
from tests.ops.head_calls import assert_as_good_as_plain, plain_torch

CASES = [
    pytest.param(case, ranks, f"{name}, {ranks}", id=f"{name}-{ranks}")
    for name, case in worker.cases().items()
    for ranks in case.ranks
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the three ranks found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker.work, args=(folder,), nprocs=3)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


def whole(function, case, ranks):
    """Logp, entropy and gradients of the unsharded head."""
    tensors = case.inputs(ranks)
    hidden, weight, targets, bias = tensors
    leaves = [x for x, need in zip((hidden, weight, bias), case.needs, strict=True) if need]
    leaves = [x.requires_grad_() for x in leaves if x is not None]
    if function is plain_torch:
        bias = torch.zeros((), dtype=case.dtype) if bias is None else bias
        targets = targets.where(targets != case.ignore_index, -100)
        outputs = plain_torch(hidden, weight, targets, bias=bias, **case.head)
    else:
        outputs = oracle.linear_logprob(
            hidden, weight, targets, bias=bias, ignore_index=case.ignore_index, **case.head
        )
    used = outputs[int(case.only_entropy) : 2 if case.entropy else 1]
    upstream = case.upstream()[int(case.only_entropy) : 2 if case.entropy else 1]
    upstream = [g.to(o.dtype) for g, o in zip(upstream, used, strict=True)]
    grads = torch.autograd.grad(used, leaves, upstream) if leaves else []
    return [x.detach() for x in (*outputs[: 2 if case.entropy else 1], *grads)]


def joined(found, case, ranks, key):
    """The ranks' results as those of one head: shards of weight and bias end to end."""
    mine = [found[rank][key] for rank in range(ranks)]
    shared = (2 if case.entropy else 1) + case.needs[0]
    for i in range(shared):  # logp, entropy and d hidden are the same on every rank, to the bit
        assert all(torch.equal(mine[0][i], other[i]) for other in mine[1:])
    sharded = [torch.cat(parts) for parts in zip(*(m[shared:] for m in mine), strict=True)]
    return [*mine[0][:shared], *sharded]


@pytest.mark.parametrize(("case", "ranks", "key"), CASES)
def test_equals_the_whole_head_gradients_included(case, ranks, key, found):
    got = joined(found, case, ranks, key)
    naive, truth = whole(plain_torch, case, ranks), whole(oracle.linear_logprob, case, ranks)
    assert got[0].dtype == torch.float32
    assert all(g.dtype == case.dtype for g in got[2 if case.entropy else 1 :])
    rounding = torch.float32 if case.dtype == torch.float64 else case.dtype
    assert_as_good_as_plain(got, naive, [t.double() for t in truth], rounding)
    if case.dtype == torch.float64:  # gradients in the dtype of the inputs
        for gradient, exact in zip(got[2:], truth[2:], strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-6)
    if case.rows:
        assert (got[0] <= 0).all()
        ignored = case.inputs(ranks)[2] == case.ignore_index
        assert ignored.any()
        assert (got[0][ignored] == 0).all()


@pytest.mark.parametrize(
    ("fault", "own", "others"),
    [
        ("target out of range", r"targets\[1\] = 37 is outside \[0, 37\)", None),
        ("rows", "rows N to be the same on every rank, received 13 on rank 0, 12 on rank 1", None),
        ("width", "hidden size D to be the same .* 6 on rank 0, 5 on rank 1, 6 on rank 2", None),
        ("targets", "targets to be the same on every rank, received different ones", None),
        ("bias", "whether there is a bias to be the same .* 1 on rank 0, 0 on rank 1", None),
        ("temperature", "temperature .* 1.0 on rank 0, 0.5 on rank 1", None),
        ("softcap", "softcap .* None on rank 0, 2.0 on rank 1", None),
        ("ignore_index", "ignore_index .* -100 on rank 0, -1 on rank 1", None),
        ("entropy", "return_entropy to be the same", None),
        ("gradient", "whether hidden requires a gradient to be the same", None),
        ("dtype of the targets", "targets: expected torch.int64", "rank 1 of the group refused"),
        ("an empty shard", "weight has no elements", "rank 1 of the group refused"),
        ("not finite", r"logp\[\d\] is nan: hidden, weight or bias", None),
        ("backend", "RuntimeError.*forced but cannot serve", "rank 1 of the group refused"),
        ("no tensor", "TypeError.*received list", "rank 1 of the group refused"),
    ],
)
def test_every_rank_raises_where_one_is_wrong(fault, own, others, found):
    for rank in range(3):
        message = found[rank][f"fault: {fault}"]
        expected = own if rank == 1 or others is None else others
        assert re.search(expected, message), (rank, message)


def test_every_fault_is_tried():
    marks = test_every_rank_raises_where_one_is_wrong.pytestmark
    assert {values[0] for values in marks[0].args[1]} == set(worker.FAULTS)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_are_never_kept_whole(backend, found):
    """Chunks of 64 KiB: no buffer has a fifth of the 600 x 300 logits of a rank."""
    for rank in range(3):
        assert found[rank][f"largest: {backend}"] <= 600 * 300 / 5


def test_equals_the_sharded_loss_of_torch(found):
    for rank in range(3):
        for ours, theirs in zip(found[rank]["ours"], found[rank]["loss_parallel"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_a_shard_knows_its_log_sum_exp(backend, magnitude):
    g = torch.Generator().manual_seed(0)
    hidden, weight = magnitude * torch.randn(9, 5, generator=g), torch.randn(50, 5, generator=g)
    head = LinearHead(weight, torch.randn(50, generator=g), 1.3, 30.0 * magnitude, 0.7)
    local = torch.arange(9)
    local[2] = -1
    with airl_fast.backend(backend):
        read = read_shard(forward_for(hidden, head), hidden, head, local, True)
    options = {"temperature": 1.3, "softcap": 30.0 * magnitude, "logit_scale": 0.7}
    logits = oracle.head_logits(hidden[local >= 0], weight, bias=head.bias, **options)
    torch.testing.assert_close(read.log_sum, logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_without_a_process_group():
    hidden, weight = torch.ones(1, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match="init_process_group first, or use linear_logprob"):
        vocab_parallel_linear_logprob(hidden, weight, torch.zeros(1, dtype=torch.int64))
