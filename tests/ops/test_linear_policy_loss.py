"""linear_policy_loss against the loss composed from linear_logprob, and against the oracle."""

import math
from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airl_fast import PolicyLossStats, linear_policy_loss
from airl_fast.ops import _head
from tests import oracle
from tests.ops.policy_loss_calls import HEAD, LENGTHS, UPSTREAM, composed, gradients, inputs, leaves

pytestmark = pytest.mark.usefixtures("served_by")


@pytest.fixture(params=[5, 10**6], ids=["many_chunks", "one_chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(_head, "CHUNK_BYTES", 4 * 13 * request.param)


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "all_head_options"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3], ids=["", "entropy"])
@pytest.mark.parametrize("beta", [0.0, 0.4], ids=["", "beta"])
@pytest.mark.parametrize("delta", [None, 1.3], ids=["", "delta"])
@pytest.mark.parametrize("on_policy", [True, False], ids=["on_policy", "old"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_equals_the_composed_loss(
    importance, aggregation, on_policy, delta, beta, entropy_coef, head, monkeypatch
):
    monkeypatch.setattr(_head, "CHUNK_BYTES", 4 * 13 * 5)
    tensors = inputs()
    if on_policy:
        tensors["old_logp"] = None
    options = {
        "importance": importance,
        "aggregation": aggregation,
        "normaliser": 7.0 if aggregation == "constant" else None,
        "delta": delta,
        "beta": beta,
        "entropy_coef": entropy_coef,
        "clip_low": 0.1,
        "clip_high": 0.25,
        **head,
    }
    loss, _ = linear_policy_loss(**tensors, **options)
    expected = composed(**tensors, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    got, expected = gradients(loss, leaves(tensors)), gradients(expected, leaves(tensors))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_matches_the_oracle(importance, aggregation, chunks):
    options = {
        "importance": importance,
        "aggregation": aggregation,
        "normaliser": 7.0 if aggregation == "constant" else None,
        "delta": 1.4,
        "beta": 0.1,
        "entropy_coef": 0.05,
        **HEAD,
    }
    tensors = inputs()
    loss, stats = linear_policy_loss(**tensors, **options)
    exact, exact_stats = oracle.policy_loss(**tensors, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    got, expected = gradients(loss, leaves(tensors)), gradients(exact, leaves(tensors))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    names = {"clip_fraction": "clip_fraction", "ratio_mean": "ratio"}
    names |= {"kl_ref": "kl", "entropy_mean": "entropy"}
    for ours, theirs in names.items():
        assert getattr(stats, ours).item() == pytest.approx(exact_stats[theirs], rel=1e-5)
    assert 0 < stats.clip_fraction < 1


def test_statistics_are_detached_float32_and_hold_the_log_probs():
    tensors = inputs(dtype=torch.bfloat16)
    _, stats = linear_policy_loss(**tensors)
    assert isinstance(stats, PolicyLossStats)
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in stats)
    logp, entropy = oracle.linear_logprob(*list(tensors.values())[:3], bias=tensors["bias"])
    torch.testing.assert_close(stats.logp.double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    log_rho = (logp - tensors["old_logp"])[tensors["targets"] != -100]
    torch.testing.assert_close(
        stats.kl_old.double(), (log_rho.exp() - 1 - log_rho).mean(), rtol=1e-5, atol=1e-6
    )
    _, on_policy = linear_policy_loss(**tensors | {"old_logp": None, "ref_logp": None})
    assert on_policy.ratio_mean == 1
    assert on_policy.clip_fraction == on_policy.kl_old == on_policy.kl_ref == 0


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype, importance, refuses, chunks):
    tensors = inputs(dtype=dtype, width=32)
    options = {"beta": 0.1, "entropy_coef": 0.05, "importance": importance, "softcap": 9.0}
    if refuses(dtype, lambda: linear_policy_loss(**tensors, **options)):
        return
    loss, _ = linear_policy_loss(**tensors, **options)
    exact, _ = oracle.policy_loss(**tensors, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    got, truth = gradients(loss, leaves(tensors)), gradients(exact, leaves(tensors))
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == dtype
        # Only the result is rounded to half precision, and only once. (The upstream gradient of a
        # float32 loss is float32, so float64 inputs gain nothing beyond that.)
        rtol = max(torch.finfo(dtype).eps / 2, 1e-5)
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=2e-5)


def test_a_loss_scale_finds_gradients_that_float16_cannot_hold():
    tensors = inputs(dtype=torch.float16)
    options = {"aggregation": "constant", "normaliser": 1e8}
    loss, _ = linear_policy_loss(**tensors, **options)
    scaled = torch.autograd.grad(loss * 1e8, leaves(tensors))
    loss, _ = linear_policy_loss(**tensors, aggregation="constant", normaliser=1.0)
    for a, b in zip(scaled, torch.autograd.grad(loss, leaves(tensors)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


def test_autocast_does_not_round_the_logits():
    tensors = inputs()
    expected, _ = linear_policy_loss(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_policy_loss(**tensors)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_gradients_reach_exactly_the_inputs_that_require_them(needs):
    tensors = inputs()
    everything = gradients(linear_policy_loss(**tensors)[0], leaves(tensors))
    for leaf, need in zip(leaves(tensors), needs, strict=True):
        leaf.requires_grad_(need)
    loss, _ = linear_policy_loss(**tensors)
    assert loss.requires_grad == any(needs)
    if any(needs):
        (UPSTREAM * loss).backward()
    for leaf, need, expected in zip(leaves(tensors), needs, everything, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert leaf.grad.is_contiguous()
            # Not to the bit: a frozen head's sums are added up in another order.
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "all_head_options"])
@pytest.mark.usefixtures("chunks")
def test_a_frozen_head_leaves_the_other_gradient_as_it_is(head, importance):
    tensors = inputs()
    everything = gradients(
        linear_policy_loss(**tensors, importance=importance, **head)[0], leaves(tensors)
    )
    for name in ("weight", "bias"):
        tensors[name].requires_grad_(False)
    loss, _ = linear_policy_loss(**tensors, importance=importance, **head)
    (got,) = gradients(loss, [tensors["hidden"]])
    torch.testing.assert_close(got, everything[0], rtol=1e-5, atol=1e-6)


def test_backward_twice_and_without_gradients():
    tensors = inputs()
    loss, _ = linear_policy_loss(**tensors)
    first = torch.autograd.grad(loss, leaves(tensors), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * loss, leaves(tensors)), strict=True):
        torch.testing.assert_close(3 * a, b)
    with torch.no_grad():
        quiet, _ = linear_policy_loss(**tensors)
    assert torch.equal(quiet, loss)
    assert not quiet.requires_grad


def test_an_upstream_gradient_of_one_equals_any_other():
    """It is passed on as it is, not multiplied: still a gradient of its own, compiled or not."""
    tensors = inputs()
    doubled = torch.autograd.grad(2 * linear_policy_loss(**tensors)[0], leaves(tensors))
    loss, _ = linear_policy_loss(**tensors)
    for _ in range(2):  # into .grad, which must not be what the graph still holds
        loss.backward(retain_graph=True)
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(**tensors)[0], leaves(tensors))
    for leaf, one, two in zip(leaves(tensors), traced, doubled, strict=True):
        torch.testing.assert_close(leaf.grad, two)
        torch.testing.assert_close(2 * one, two)


def test_a_gradient_that_was_not_computed_is_never_taken_for_zero():
    t = inputs()
    fixed = (1.0, None, 1.0, 0.2, 0.2, None, 0.0, 0.0, "token", "token", 1.0)
    tensors = (t["hidden"], t["weight"], t["targets"], t["advantages"], t["cu_seqs"])
    loss = torch.ops.airl_fast.linear_policy_loss(
        *tensors, None, None, None, *fixed, True, False, False
    )[0]
    with pytest.raises(RuntimeError, match="gradient at weight was not computed"):
        loss.backward()


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_chunks_do_not_change_the_result(importance, monkeypatch):
    tensors, outcomes = inputs(), []
    for rows in (1, 2, 3, 8, 100):
        monkeypatch.setattr(_head, "CHUNK_BYTES", 4 * 13 * rows)
        loss, stats = linear_policy_loss(**tensors, importance=importance, beta=0.1)
        outcomes.append([loss, *stats, *gradients(loss, leaves(tensors))])
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_constant_normaliser_does_not_see_how_the_batch_was_cut(importance):
    tensors = inputs(ignored=0)
    options = {"importance": importance, "aggregation": "constant", "normaliser": 19.0}
    whole = gradients(linear_policy_loss(**tensors, **options)[0], leaves(tensors))
    offsets = tensors["cu_seqs"].tolist()
    for first, last in ((0, 3), (3, len(offsets) - 1)):
        rows = slice(offsets[first], offsets[last])
        part = {n: t if n in ("weight", "bias") else t[rows] for n, t in tensors.items()}
        part["cu_seqs"] = tensors["cu_seqs"][first : last + 1] - offsets[first]
        (linear_policy_loss(**part, **options)[0] * UPSTREAM).backward()
    for leaf, expected in zip(leaves(tensors), whole, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("lengths", [(), (0, 0), (2, 3)])
def test_no_action_at_all_gives_zero(lengths, importance, aggregation):
    tensors = inputs(lengths)
    tensors["targets"].fill_(-100)
    options = {"importance": importance, "aggregation": aggregation, "entropy_coef": 0.1}
    loss, stats = linear_policy_loss(**tensors, **options)
    assert loss == 0
    assert stats.ratio_mean.isnan()
    assert (stats.logp == 0).all()
    for gradient in gradients(loss, leaves(tensors)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_action():
    tensors = inputs((1,), vocab=1, ignored=0)
    loss, stats = linear_policy_loss(**tensors | {"old_logp": None})
    assert loss == -tensors["advantages"][0]
    assert stats.logp == stats.entropy == 0


def test_ignored_rows_are_never_read(chunks):
    tensors = inputs()
    expected = linear_policy_loss(**tensors, beta=0.1)
    clean = gradients(expected[0], leaves(tensors))
    ignored = tensors["targets"] == -100
    for name in ("hidden", "advantages", "old_logp", "ref_logp"):
        tensors[name] = tensors[name].detach().clone()
        tensors[name][ignored] = math.nan
    tensors["hidden"].requires_grad_()
    loss, stats = linear_policy_loss(**tensors, beta=0.1)
    torch.testing.assert_close([loss, *stats], [expected[0], *expected[1]], rtol=0, atol=0)
    got = gradients(loss, leaves(tensors))
    torch.testing.assert_close(got, clean, rtol=0, atol=0)


def test_non_contiguous_and_expanded_inputs():
    tensors = inputs()
    expected = gradients(linear_policy_loss(**tensors)[0], leaves(tensors))
    odd = {}
    for name, t in tensors.items():
        wide = t.detach().repeat_interleave(2, 0)
        odd[name] = (wide.t().contiguous().t() if t.dim() == 2 else wide)[::2]
        assert not odd[name].is_contiguous()
    for leaf in leaves(odd):
        leaf.requires_grad_()
    got = gradients(linear_policy_loss(**odd)[0], leaves(odd))
    torch.testing.assert_close(got, expected)
    row = torch.randn(1, requires_grad=True)
    one = torch.ones(1).expand(len(tensors["targets"]))
    shared = tensors | {"bias": row.expand(13), "advantages": one}
    loss, _ = linear_policy_loss(**shared)
    exact, _ = oracle.policy_loss(**shared)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    wanted = [tensors["hidden"], tensors["weight"], row]
    for a, b in zip(gradients(loss, wanted), gradients(exact, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size):
    tensors = inputs(ignored=0)
    with torch.no_grad():
        tensors["hidden"] *= size / 3
    tensors |= {"old_logp": None, "ref_logp": None}
    loss, stats = linear_policy_loss(**tensors, entropy_coef=0.1)
    assert loss.isfinite()
    assert (stats.logp <= 0).all()
    assert ((stats.entropy >= 0) & (stats.entropy <= math.log(13) * (1 + 4e-7))).all()
    assert all(g.isfinite().all() for g in gradients(loss, leaves(tensors)))


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_compiled_equals_eager_with_ignored_rows(importance):
    def run(hidden, weight, bias, others):
        loss, stats = linear_policy_loss(
            hidden=hidden * 2, weight=weight, bias=bias, importance=importance, beta=0.1, **others
        )
        return -2 * loss, stats.entropy_mean

    tensors = inputs(ignored=0.4)
    wanted = leaves(tensors)
    others = {n: t for n, t in tensors.items() if n not in ("hidden", "weight", "bias")}
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        loss, entropy = function(*wanted, others)
        results.append([loss, entropy, *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_opcheck(needs, importance):
    t = inputs((2, 3))
    for leaf, need in zip(leaves(t), needs, strict=True):
        leaf.requires_grad_(need)
    tensors = (t["hidden"], t["weight"], t["targets"], t["advantages"], t["cu_seqs"])
    optional = (t["old_logp"], t["ref_logp"], t["bias"])
    options = (0.7, 3.0, 1.1, 0.2, 0.3, 1.5, 0.1, 0.1, importance, "token", 1.0)
    op = torch.ops.airl_fast.linear_policy_loss.default
    torch.library.opcheck(op, (*tensors, *optional, *options, *needs))


# The backend is the same for every example.
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_and_option(data):
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    vocab, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 8))
    seed, ignored = data.draw(st.integers(0, 99)), data.draw(st.floats(0, 1))
    tensors = inputs(lengths, vocab, seed=seed, ignored=ignored)
    for name in ("old_logp", "bias"):
        if data.draw(st.booleans()):
            tensors[name] = None
    aggregation = data.draw(st.sampled_from(["token", "sequence", "constant"]))
    options = {
        "importance": data.draw(st.sampled_from(["token", "sequence"])),
        "aggregation": aggregation,
        "normaliser": data.draw(st.floats(1, 9)) if aggregation == "constant" else None,
        "clip_low": data.draw(st.floats(0, 1)),
        "clip_high": data.draw(st.floats(0, 1)),
        "delta": data.draw(st.none() | st.floats(0.5, 3)),
        "beta": data.draw(st.floats(0, 1)),
        "entropy_coef": data.draw(st.floats(-1, 1)),
        "temperature": data.draw(st.floats(0.5, 2)),
        "softcap": data.draw(st.none() | st.floats(1, 9)),
    }
    if tensors["old_logp"] is not None:
        # At a ratio of exactly a bound, which side rounding falls on decides the gradient: a case
        # for test_on_policy_gradients_at_the_bounds, not for a comparison across precisions.
        tensors["old_logp"] = tensors["old_logp"] - 0.01
    wanted = [t for t in leaves(tensors) if t is not None]
    with patch.object(_head, "CHUNK_BYTES", 4 * vocab * rows):
        loss, _ = linear_policy_loss(**tensors, **options)
    exact, _ = oracle.policy_loss(**tensors, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients(loss, wanted), gradients(exact, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_on_policy_gradients_at_the_bounds():
    tensors = inputs() | {"old_logp": None}
    for importance in ("token", "sequence"):
        options = {"clip_low": 0.0, "clip_high": 0.0, "delta": 1.0, "importance": importance}
        loss, _ = linear_policy_loss(**tensors, **options)
        exact, _ = oracle.policy_loss(**tensors, **options)
        got, truth = gradients(loss, leaves(tensors)), gradients(exact, leaves(tensors))
        assert got[0].abs().max() > 0.01
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_infinite_clip_range_switches_clipping_off():
    tensors = inputs()
    loss, stats = linear_policy_loss(**tensors, clip_low=math.inf, clip_high=math.inf)
    exact, _ = oracle.policy_loss(**tensors, clip_low=math.inf, clip_high=math.inf)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    assert stats.clip_fraction == 0


def test_a_reference_that_is_only_watched_cannot_break_the_loss():
    tensors = inputs() | {"ref_logp": torch.full((sum(LENGTHS),), 200.0)}
    loss, stats = linear_policy_loss(**tensors)
    assert loss.isfinite()
    assert stats.kl_ref.isinf()


def bad_calls():
    n = sum(LENGTHS)
    nan, grad = torch.zeros(n), torch.zeros(n, requires_grad=True)
    nan[0] = math.nan
    offsets = torch.tensor([0, 5, 3, n]).int()
    yield "advantages", {"advantages": torch.zeros(n, 1)}, r"advantages: expected shape \(19,\)"
    yield "advantages int", {"advantages": torch.zeros(n).long()}, "advantages: expected bfloat16"
    yield "advantages nan", {"advantages": nan}, r"advantages\[0\] is nan"
    yield "advantages grad", {"advantages": grad}, "advantages requires a gradient.*detach"
    yield "old_logp", {"old_logp": torch.zeros(3)}, r"old_logp: .*received \(3,\)"
    yield "ref device", {"ref_logp": torch.zeros(n).to("meta")}, "ref_logp is on meta"
    yield "cu_seqs int64", {"cu_seqs": offsets.long()}, "cu_seqs: expected int32.*torch.int64"
    yield "cu_seqs device", {"cu_seqs": offsets.to("meta")}, "cu_seqs is on meta"
    yield "cu_seqs order", {"cu_seqs": offsets}, r"cu_seqs: .*N = 19, received \[0, 5, 3, 19\]"
    yield "cu_seqs end", {"cu_seqs": offsets[:2]}, r"cu_seqs: .*received \[0, 5\]"
    yield "target", {"targets": torch.full((n,), 13)}, r"targets\[0\] = 13 is outside \[0, 13\)"
    yield "clip_low", {"clip_low": -0.1}, "clip_low: expected.*received -0.1"
    yield "clip_high", {"clip_high": math.nan}, "clip_high: expected.*received nan"
    yield "delta", {"delta": 0.0}, "delta: .*received 0.0; use None"
    yield "beta", {"beta": -1.0}, "beta: expected.*received -1.0"
    yield "no ref", {"beta": 0.1, "ref_logp": None}, "beta = 0.1 needs ref_logp"
    yield "entropy_coef", {"entropy_coef": math.inf}, "entropy_coef: .*received inf"
    yield "importance", {"importance": "seq"}, "importance: .*received 'seq'"
    yield "aggregation", {"aggregation": "mean"}, "aggregation: .*received 'mean'"
    yield "normaliser", {"normaliser": 2.0}, "aggregation='token' with normaliser=2.0"
    yield "no normaliser", {"aggregation": "constant"}, "'constant' with normaliser=None"
    yield "zero", {"aggregation": "constant", "normaliser": 0.0}, "normaliser: .*received 0.0"
    yield "overflow", {"old_logp": torch.full((n,), -200.0)}, "the loss is .*overflows"
    yield "sharded", {"weight": torch.zeros(0)}, "ZeRO-3"


@pytest.mark.parametrize(
    ("changes", "message"), [pytest.param(*call[1:], id=call[0]) for call in bad_calls()]
)
def test_errors_say_what_was_received_and_what_to_do(changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        linear_policy_loss(**inputs() | changes)
