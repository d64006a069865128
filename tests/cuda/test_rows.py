"""The CUDA row kernels, emulated, against the oracle."""

import math
from types import SimpleNamespace

import pytest
import torch

from airl_fast.ops._gpu_rows import ROW_STATS, gradient_view, row_head
from airl_fast.ops._policy_terms import ActionLoss, Actions
from tests import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [{}, {"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.3}]
POLICIES = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "delta": 1.5, "beta": 0.2, "entropy_coef": 0.05},
]


@pytest.fixture
def planned(rows, emulated, monkeypatch):
    """Calls a method of the kernels with a row shared out as told: (cluster, threads, bytes)."""

    def call(plan, method, *arguments):
        with monkeypatch.context() as patch:
            forced = SimpleNamespace(
                read_rows=lambda *args: emulated.read_rows(*args, plan),
                policy_rows=lambda *args: emulated.policy_rows(*args, plan),
                differentiate_rows=emulated.differentiate_rows,
            )
            patch.setattr(rows, "_cuda", forced)
            return getattr(rows, method)(*arguments)

    return call


def inputs(vocab, rows=5, dtype=torch.float32, magnitude=1.0, offset=0, room=11):
    """Logits whose rows start `offset` elements past a boundary, with room between them."""
    g = torch.Generator().manual_seed(vocab)
    a = (torch.randn(rows, vocab + room + offset, generator=g) * magnitude).to(dtype)
    a = a[:, offset : offset + vocab]
    bias, targets = torch.randn(vocab, generator=g), torch.randint(vocab, (rows,), generator=g)
    return a, bias, targets, torch.randn(2, rows, generator=g)


def described(bias, head):
    options = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, **head}
    return row_head(bias, *options.values())


def exact(a, targets, bias, **head):
    """The oracle on logits: a head whose hidden states are a, and whose weight is 1."""
    return oracle.linear_logprob(a, torch.eye(a.shape[1]), targets, bias=bias, **head)


def poisoned(count):
    return torch.full((count,), math.nan)


def tolerances(dtype, magnitude):
    """Of z, which is rounded to float32 a few times, and of a gradient stored as dtype."""
    atol = 4e-7 * max(8.0, 4 * magnitude)
    rtol = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    return atol, {"rtol": rtol, "atol": 4 * atol}


# One logit, less than a vector, whole ones, odd tails; every place a row can start.
SHAPES = [(1, 0), (3, 1), (67, 5), (1031, 3), (1040, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 40.0])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "all"])
@pytest.mark.parametrize(("vocab", "offset"), SHAPES)
def test_values_and_gradients_match_the_oracle(vocab, offset, head, magnitude, dtype, planned):
    a, bias, targets, upstream = inputs(vocab, dtype=dtype, magnitude=magnitude, offset=offset)
    bias = bias if head else None
    leaf = a.double().requires_grad_()
    truth = exact(leaf, targets, bias, **head)
    (gradient,) = torch.autograd.grad(truth, leaf, list(upstream.double()))
    logp, entropy, stats = poisoned(5), poisoned(5), torch.full((5, ROW_STATS), math.nan)
    around = a.as_strided((5, 11), a.stride(), a.storage_offset() + vocab)[:-1].clone()
    planned((2, 64, 0), "read", a, described(bias, head), targets, logp, entropy, stats)
    atol, stored = tolerances(dtype, magnitude)
    torch.testing.assert_close(logp.double(), truth[0], rtol=0, atol=atol)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=0, atol=atol)
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    planned(None, "differentiate", a, described(bias, head), targets, *upstream, stats, a)
    torch.testing.assert_close(a.double(), gradient, **stored)
    after = a.as_strided((5, 11), a.stride(), a.storage_offset() + vocab)[:-1]
    assert torch.equal(after, around)


def actions_of(a, targets, bias, head, ref):
    """Actions whose log-probabilities have drifted by about as much as clipping allows."""
    rows = len(targets)
    numbers = torch.randn(3, rows, generator=torch.Generator().manual_seed(a.shape[1]))
    logp = exact(a, targets, bias, **head)[0].float()
    return Actions(
        rows=torch.arange(rows),
        targets=targets,
        sequence=torch.zeros(rows, dtype=torch.int64),
        advantages=numbers[0],
        old_logp=logp + 0.5 * numbers[1],
        ref_logp=logp + 0.5 * numbers[2] if ref else None,
        share=torch.full((rows,), 1 / rows),
    )


def policy_truth(a, bias, head, actions, options):
    """The oracle's loss, logp, entropy and gradient at the logits."""
    leaf = a.double().requires_grad_()
    loss, _ = oracle.policy_loss(
        leaf,
        torch.eye(a.shape[1]),
        actions.targets,
        actions.advantages,
        cu_seqs=torch.tensor([0, len(a)], dtype=torch.int32),
        old_logp=actions.old_logp,
        ref_logp=actions.ref_logp,
        bias=bias,
        **head,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return *exact(a, actions.targets, bias, **head), gradient


def action_loss(clip_low=0.2, clip_high=0.2, delta=None, beta=0.0, entropy_coef=0.0):
    return ActionLoss(clip_low, clip_high, delta, beta, entropy_coef, per_sequence=False)


# A row that one block keeps whole, that four keep, that they keep a part of, and nothing of.
PLANS = [(1, 64, 8192), (4, 32, 2048), (2, 32, 512), (1, 96, 0)]


HALF = [torch.bfloat16, torch.float16]
KINDS = [*((dtype, dtype) for dtype in DTYPES), *((torch.float32, dtype) for dtype in HALF)]


@pytest.mark.parametrize(("dtype", "stored_as"), KINDS, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    ("head", "options"), [*zip(HEADS, POLICIES, strict=True)], ids=["plain", "all"]
)
@pytest.mark.parametrize(("vocab", "offset"), [(1, 0), (6, 1), (1031, 3), (1600, 8)])
def test_the_policy_loss_matches_the_oracle(
    vocab, offset, head, options, plan, dtype, stored_as, planned
):
    narrow = dtype != stored_as  # then rows start on multiples of 16 bytes
    place = {"offset": 0, "room": -vocab % 4} if narrow else {"offset": offset}
    a, bias, targets, upstream = inputs(vocab, dtype=dtype, magnitude=2.0, **place)
    bias = bias if head else None
    actions = actions_of(a, targets, bias, head, ref="beta" in options)
    logp, entropy, gradient = policy_truth(a, bias, head, actions, options)
    found, head_of = (poisoned(5), poisoned(5)), described(bias, head)
    out = gradient_view(a, stored_as)
    planned(plan, "policy", a, head_of, actions, action_loss(**options), *found, out)
    atol, stored = tolerances(stored_as, 2.0)
    torch.testing.assert_close(found[0].double(), logp, rtol=0, atol=atol)
    torch.testing.assert_close(found[1].double(), entropy, rtol=0, atol=atol)
    torch.testing.assert_close(out.double(), gradient, **stored)
    if not narrow:
        return
    a, *_ = inputs(vocab, dtype=dtype, magnitude=2.0, **place)
    leaf = a.double().requires_grad_()
    truth = exact(leaf, targets, bias, **head)
    (gradient,) = torch.autograd.grad(truth, leaf, list(upstream.double()))
    out = gradient_view(a, stored_as)
    planned(plan, "differentiate", a, head_of, targets, *upstream, None, out)
    torch.testing.assert_close(out.double(), gradient, **stored)


def run_everything(planned, plan, a, targets, bias=None, head=None):
    """Read, policy and differentiate, each on its own copy of the logits."""
    head_of = described(bias, head or {})
    rows = len(a)
    actions = actions_of(a, targets, bias, head or {}, ref=True)
    loss = action_loss(beta=0.1, entropy_coef=0.01)
    outputs = [poisoned(rows) for _ in range(4)]
    stats, copies = torch.full((rows, ROW_STATS), math.nan), [a.clone(), a.clone()]
    planned(plan, "read", a, head_of, targets, *outputs[:2], stats)
    planned(plan, "policy", copies[0], head_of, actions, loss, *outputs[2:], copies[0])
    upstream = actions.advantages, actions.share
    planned(plan, "differentiate", copies[1], head_of, targets, *upstream, None, copies[1])
    return [*outputs, stats, *copies]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_two_runs_give_the_same_bits_and_a_row_does_not_depend_on_its_neighbours(
    plan, dtype, planned
):
    a, bias, targets, _ = inputs(1031, dtype=dtype, magnitude=4.0, offset=2)
    arguments = targets, bias, HEADS[1]
    first, second = (run_everything(planned, plan, a, *arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    logp = poisoned(1)
    planned(plan, "read", a[3:4], described(bias, HEADS[1]), targets[3:4], logp, None, None)
    assert logp == first[0][3]


def test_the_launch_changes_no_more_than_the_order_of_sums(planned):
    a, bias, targets, _ = inputs(1031, magnitude=4.0)
    runs = [run_everything(planned, plan, a, targets, bias, HEADS[1]) for plan in PLANS]
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("column", [0, 2, 517, 1030])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(value, column, plan, planned):
    a, _, targets, _ = inputs(1031)
    a[1] = -math.inf
    a[1, column] = a[2, column] = value
    a[3] = value
    logp, entropy, *_ = run_everything(planned, plan, a, targets)
    assert logp.isfinite().tolist() == [True, False, False, False, True]
    assert entropy.isfinite().tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_masked_tokens_leave_the_log_probability_right(plan, planned):
    a, _, targets, _ = inputs(1031)
    a[:, :600] = -math.inf
    targets = targets % 431 + 600
    logp = poisoned(5)
    planned(plan, "read", a, described(None, {}), targets, logp, None, None)
    expected, _ = exact(a[:, 600:], targets - 600, None)
    torch.testing.assert_close(logp.double(), expected)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rising_maxima_and_huge_logits(plan, planned):
    a = torch.linspace(-1e4, 1e4, 6000).repeat(2, 1)
    a[1, -3000:] = 1e4
    targets = torch.tensor([5999, 5000])
    logp, entropy, *_ = run_everything(planned, plan, a, targets)
    expected = exact(a, targets, None)
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-6)
    assert logp[1] == -entropy[1] == torch.tensor(-math.log(3000))


@pytest.mark.parametrize("target", [-100, -1, 1031, 2**62, -(2**62)])
def test_a_target_that_is_no_column_gives_nan_in_its_row_alone(target, planned):
    a, _, targets, _ = inputs(1031)
    expected = run_everything(planned, PLANS[1], a, targets)
    # What the oracle cannot be asked: whatever the row, its actions' other numbers stay.
    head_of, wrong = described(None, {}), targets.clone()
    wrong[2] = target
    logp, entropy, stats = poisoned(5), poisoned(5), torch.empty(5, ROW_STATS)
    planned(PLANS[1], "read", a, head_of, wrong, logp, entropy, stats)
    assert logp.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(entropy, expected[1])
    actions = actions_of(a, targets, None, {}, ref=True)
    found, results = a.clone(), (poisoned(5), poisoned(5))
    loss = action_loss(beta=0.1, entropy_coef=0.01)
    given = actions._replace(targets=wrong)
    planned(PLANS[1], "policy", found, head_of, given, loss, *results, found)
    assert found[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found[others], expected[5][others])
    planned(None, "differentiate", a, head_of, wrong, actions.share, None, stats, a)
    assert a[2].isnan().all()
    assert a[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_stored_to_nearest_even(dtype, rows):
    """A target with p = 1/2 and d_logp = 2 g stores g: every rounding case of the format."""
    steps = torch.finfo(dtype).eps * torch.tensor([0.5, 1.5, 0.49, 0.51, 0.75])
    wanted = torch.cat([1 + steps, -(1 + steps)])
    a = torch.zeros(len(wanted), 2, dtype=dtype)
    targets = torch.zeros(len(wanted), dtype=torch.int64)
    rows.differentiate(a, described(None, {}), targets, 2 * wanted, None, None, a)
    torch.testing.assert_close(a, torch.stack([wanted, -wanted], 1).to(dtype))


def test_an_empty_chunk_is_left_alone(rows):
    a, targets, none = torch.empty(0, 7), torch.empty(0, dtype=torch.int64), torch.empty(0)
    head = described(None, {})
    rows.read(a, head, targets, none, none, None)
    rows.differentiate(a, head, targets, none, none, None, a)


def test_what_the_kernels_do_not_take_is_refused_in_words(rows):
    a, bias, targets, _ = inputs(16)
    head = described(bias, {})
    logp, entropy = poisoned(5), poisoned(5)
    with pytest.raises(ValueError, match=r"logits: expected \[R, V\], contiguous within a row"):
        rows.read(a.t(), head, targets, logp, entropy, None)
    with pytest.raises(ValueError, match="logits: expected float32, bfloat16 or float16, received"):
        rows.read(a.double(), head, targets, logp, entropy, None)
    with pytest.raises(ValueError, match=r"targets: expected 5 contiguous torch\.int64 numbers"):
        rows.read(a, head, targets.int(), logp, entropy, None)
    with pytest.raises(ValueError, match="rows that start on multiples of 16 bytes"):
        rows.differentiate(a[:, 1:], head, targets, logp, None, None, a[:, 1:].bfloat16())
    loss = ActionLoss(0.2, 0.2, None, 0.0, 0.0, per_sequence=True)
    actions = actions_of(a, targets, bias, {}, ref=False)
    with pytest.raises(ValueError, match='expected importance="token", received "sequence"'):
        rows.policy(a, head, actions, loss, logp, entropy, a)


HOPPER, AMPERE, ADA = (9, 227 * 1024, 132), (8, 163 * 1024, 108), (8, 99 * 1024, 128)


@pytest.mark.parametrize("device", [HOPPER, AMPERE, ADA], ids=["hopper", "ampere", "ada"])
@pytest.mark.parametrize("element", [0, 1])
@pytest.mark.parametrize("vocab", [1, 1031, 32_000, 49_152, 128_256, 151_936, 248_320, 2**24])
def test_a_plan_fits_its_device_and_keeps_whole_rows_on_hopper(vocab, element, device, emulated):
    chunk = (0, vocab, 4096, vocab, element)
    cluster, threads, kept = emulated.plan_policy(chunk, *device)
    assert cluster in ((1, 2, 4, 8) if device[0] >= 9 else (1,))
    assert threads % 32 == 0
    assert 32 <= threads <= 1024
    assert kept % (16 * threads) == 0
    assert kept + 1024 <= device[1]
    if device == HOPPER and vocab < 2**20:
        assert cluster * kept >= vocab * (2 if element else 4)
    cluster, threads, kept = emulated.plan_read(chunk, *device)
    assert (cluster, kept) == (1, 0)  # rows enough for every processor
    few = emulated.plan_read((0, vocab, 8, vocab, element), *device)
    assert few[0] == (8 if device == HOPPER and vocab >= 248_320 else few[0])
