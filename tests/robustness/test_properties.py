"""Properties, with hypothesis looking for counterexamples.

By default few examples and the same every time; ``AIRL_FAST_EXAMPLES=2000`` asks for that many of
each, other ones every time. docs/robustness.md has the counts of what was run.
"""

import math
import os
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import airl_fast
from airl_fast.integrations.rewards import SpanRewards
from airl_fast.packing import Source, Trace, pack
from airl_fast.planning import plan_micro_batches, plan_traces
from airl_fast.spans import span_offsets, span_rule
from tests import oracle
from tests.tiny_models import CHARACTERS, tiny_tokenizer

EXAMPLES = int(os.environ.get("AIRL_FAST_EXAMPLES", "0"))
TOKENIZER = tiny_tokenizer()
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
searched = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**32 - 1)
int32s = st.integers(-(2**31), 2**31 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)


def strided(x, how):
    """The same values, laid out otherwise in memory."""
    if how == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if how == "gaps":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), math.nan).to(x.dtype)
        wide[..., 1::3] = x
        return wide[..., 1::3]
    if how == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x


layouts = st.sampled_from(["plain", "transposed", "gaps", "expanded"])


@st.composite
def partitions(draw, total, empty=False):
    """Offsets of ``total`` values into spans; of none where ``empty``."""
    if empty:
        inner = sorted(draw(st.lists(st.integers(0, total), max_size=5)))
    else:
        inner = sorted(draw(st.sets(st.integers(1, total - 1), max_size=6))) if total > 1 else []
    return torch.tensor([0, *inner, total] if total or empty else [0], dtype=torch.int32)


@st.composite
def heads(draw, ignored=True):
    """Arguments of a head: any shape, no rows and a vocabulary of one included."""
    n, vocab, width = draw(st.integers(0, 7)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(seeds))
    hidden = strided(torch.randn(n, width, generator=g), draw(layouts))
    weight = strided(torch.randn(vocab, width, generator=g), draw(layouts))
    choices = (
        st.one_of(st.just(-100), st.integers(0, vocab - 1))
        if ignored
        else st.integers(0, vocab - 1)
    )
    targets = torch.tensor(draw(st.lists(choices, min_size=n, max_size=n)), dtype=torch.int64)
    options = {
        "bias": torch.randn(vocab, generator=g) if draw(st.booleans()) else None,
        "temperature": draw(st.sampled_from([0.3, 1.0, 2.5])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
    }
    dtype = draw(st.sampled_from(FLOATS))
    return hidden.to(dtype), weight.to(dtype), strided(targets, "plain"), options


def backend_for(draw, dtype):
    """A backend that serves the dtype."""
    return draw(st.sampled_from(["reference"] if dtype == torch.float64 else ["cpu", "reference"]))


def near(found, truth, atol=2e-4):
    torch.testing.assert_close(found.double(), truth.double(), rtol=1e-3, atol=atol)


@searched
@given(made=heads(), data=st.data())
def test_logprob_entropy_and_gradients(made, data):
    hidden, weight, targets, options = made
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    truth = oracle.linear_logprob(*leaves, targets, **options)
    with airl_fast.backend(backend_for(data.draw, hidden.dtype)):
        found = airl_fast.linear_logprob(*leaves, targets, return_entropy=True, **options)
        for x, y in zip(found, truth, strict=True):
            near(x, y)
        assert (found[0] <= 0).all()
        gradients = torch.autograd.grad(found[0].sum(), leaves)
    expected = torch.autograd.grad(truth[0].sum(), leaves)
    for x, y in zip(gradients, expected, strict=True):
        eps = torch.finfo(x.dtype).eps
        near(x, y, atol=2e-4 + 8 * eps * max(1.0, y.abs().max().item() if y.numel() else 1.0))


@searched
@given(made=heads(), data=st.data())
def test_the_policy_loss_and_its_gradient(made, data):
    hidden, weight, targets, options = made
    n = len(hidden)
    g = torch.Generator().manual_seed(data.draw(seeds))
    logp = oracle.linear_logprob(hidden, weight, targets, **options)[0]
    aggregation = data.draw(st.sampled_from(["token", "sequence", "constant"]))
    given_ = {
        "cu_seqs": data.draw(partitions(n, empty=True)),
        "old_logp": (logp + 0.2 * torch.randn(n, generator=g)).float().detach(),
        "importance": data.draw(st.sampled_from(["token", "sequence"])),
        "aggregation": aggregation,
        "normaliser": 3.0 if aggregation == "constant" else None,
        "entropy_coef": data.draw(st.sampled_from([0.0, 0.1])),
        **options,
    }
    advantages = torch.randn(n, generator=g)
    leaf = hidden.detach().requires_grad_()
    truth, _ = oracle.policy_loss(leaf, weight, targets, advantages, **given_)
    with airl_fast.backend(backend_for(data.draw, hidden.dtype)):
        loss, _ = airl_fast.linear_policy_loss(leaf, weight, targets, advantages, **given_)
        near(loss, truth, atol=1e-3)
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.shape == hidden.shape
    assert gradient.isfinite().all()


@searched
@given(made=heads(ignored=False), data=st.data())
def test_scores_of_spans(made, data):
    hidden, weight, targets, options = made
    n, rows = len(hidden), data.draw(st.sampled_from([1, 2]))
    g = torch.Generator().manual_seed(data.draw(seeds))
    cu = data.draw(partitions(n))
    more = {"form": data.draw(st.sampled_from(["airl", "logit"])),
            "span_logp": data.draw(st.sampled_from(["sum", "mean"]))}  # fmt: skip
    if rows == 2:
        more |= {"shaping_gamma": 0.9, "cu_seq_spans": data.draw(partitions(len(cu) - 1))}
    disc = torch.randn(n, 5, generator=g), torch.randn(rows, 5, generator=g)
    call = hidden, weight, targets, *disc, cu
    found = airl_fast.airl_score(*call, **options, **more)
    truth = oracle.airl_score(*call, **options, **more)
    for x, y in zip(found, truth, strict=True):
        near(x, y, atol=1e-3)


def loop(name, x, cu):
    """Each span by itself, in Python's floats."""
    spans = [x[a:b] for a, b in pairwise(cu)]
    if name == "segment_softmax":
        top = [max(span) for span in spans]
        raised = [[math.exp(v - m) for v in span] for span, m in zip(spans, top, strict=True)]
        return [v / sum(span) for span in raised for v in span]
    one = {
        "segment_sum": sum,
        "segment_mean": lambda v: sum(v) / len(v),
        "segment_last": lambda v: v[-1],
    }
    return [one[name](span) for span in spans]


values = st.floats(-100, 100, width=16)
SEGMENTS = ["segment_sum", "segment_mean", "segment_last", "segment_softmax"]


@st.composite
def vectors(draw):
    n = draw(st.integers(0, 40))
    x = torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64)
    x = strided(x.to(draw(st.sampled_from(FLOATS))), draw(layouts))
    return x, draw(partitions(n))


@searched
@given(made=vectors(), name=st.sampled_from(SEGMENTS), forced=st.booleans())
def test_segments_against_a_loop(made, name, forced):
    x, cu = made
    expected = loop(name, x.double().tolist(), cu.tolist())
    if forced:
        with airl_fast.backend("reference"):
            found = getattr(airl_fast, name)(x, cu)
    else:
        found = getattr(airl_fast, name)(x, cu)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


@searched
@given(made=vectors(), gamma=st.floats(0, 1), forced=st.booleans())
def test_returns_against_a_loop(made, gamma, forced):
    x, cu = made
    expected = []
    for a, b in pairwise(cu.tolist()):
        back, total = [], 0.0
        for value in reversed(x[a:b].double().tolist()):
            total = value + gamma * total
            back.append(total)
        expected += back[::-1]
    if forced:
        with airl_fast.backend("reference"):
            found = airl_fast.discounted_returns(x, cu, gamma)
    else:
        found = airl_fast.discounted_returns(x, cu, gamma)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4
    )


@searched
@given(data=st.data(), form=st.sampled_from(["airl", "logit", "wgan"]))
def test_the_discriminators_loss(data, form):
    n = data.draw(st.integers(0, 12))
    column = st.lists(st.floats(-900, 900, width=32), min_size=n, max_size=n)
    f, logp = (torch.tensor(data.draw(column), dtype=torch.float32) for _ in range(2))
    flags = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    is_expert = torch.tensor(flags, dtype=torch.bool)
    loss, _ = airl_fast.discriminator_loss(f, logp, is_expert, form=form)
    truth, _ = oracle.discriminator_loss(f, logp, is_expert, form=form)
    near(loss, truth, atol=1e-3)


# Garbage: what the oracle says, or a worded error; never a crash, never silence.


@searched
@given(data=st.data(), name=st.sampled_from([*SEGMENTS, "discounted_returns"]))
def test_random_offsets_are_served_rightly_or_refused(data, name):
    n = data.draw(st.integers(0, 12))
    offsets = data.draw(st.lists(st.one_of(st.integers(-2, n + 2), int32s), max_size=6))
    if data.draw(st.booleans()):
        offsets = [0, *sorted(offsets), n]
    x, cu = torch.arange(1.0, n + 1), torch.tensor(offsets, dtype=torch.int32)
    more = (0.5,) if name == "discounted_returns" else ()
    valid = bool(offsets) and offsets[0] == 0 and offsets[-1] == n
    valid = valid and all(a < b for a, b in pairwise(offsets))
    if not valid:
        with pytest.raises(ValueError, match=name):
            getattr(airl_fast, name)(x, cu, *more)
    else:
        near(getattr(airl_fast, name)(x, cu, *more), getattr(oracle, name)(x, cu, *more))


@searched
@given(made=heads(), data=st.data())
def test_random_targets_are_served_rightly_or_refused(made, data):
    hidden, weight, _, options = made
    n, vocab = len(hidden), len(weight)
    one = st.one_of(st.integers(-3, vocab + 3), st.just(-100), int64s)
    targets = torch.tensor(data.draw(st.lists(one, min_size=n, max_size=n)), dtype=torch.int64)
    valid = all(0 <= t < vocab or t == -100 for t in targets.tolist())
    cu = torch.tensor([0, n], dtype=torch.int32)
    calls = {
        "logp": lambda: airl_fast.linear_logprob(hidden, weight, targets, **options),
        "loss": lambda: (
            airl_fast.linear_policy_loss(
                hidden, weight, targets, torch.ones(n), cu_seqs=cu, **options
            )[1].logp
        ),
    }
    for call in calls.values():
        if valid:
            near(call(), oracle.linear_logprob(hidden, weight, targets, **options)[0])
        else:
            with pytest.raises(ValueError, match=r"targets\[\d+\] = -?\d+ is outside"):
                call()


@searched
@given(data=st.data())
def test_random_sequence_offsets_are_served_rightly_or_refused(data):
    n = data.draw(st.integers(0, 6))
    offsets = data.draw(st.lists(st.one_of(st.integers(-2, n + 2), int32s), min_size=1, max_size=5))
    if data.draw(st.booleans()):
        offsets = [0, *sorted(max(0, min(n, o)) for o in offsets), n]
    hidden, weight = torch.ones(n, 2), torch.eye(3, 2)
    targets, cu = torch.zeros(n, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int32)
    valid = offsets[0] == 0 and offsets[-1] == n and all(a <= b for a, b in pairwise(offsets))
    call = hidden, weight, targets, torch.ones(n)
    if not valid:
        with pytest.raises(ValueError, match="cu_seqs: expected offsets that start at 0"):
            airl_fast.linear_policy_loss(*call, cu_seqs=cu)
    else:
        loss, _ = airl_fast.linear_policy_loss(*call, cu_seqs=cu, aggregation="sequence")
        near(loss, oracle.policy_loss(*call, cu_seqs=cu, aggregation="sequence")[0])


# Packing and spans.


@st.composite
def traces(draw):
    prompts = draw(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=5), min_size=1,
                            max_size=3))  # fmt: skip
    made = []
    for _ in range(draw(st.integers(1, 7))):
        completion = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
        cu = draw(partitions(len(completion))).tolist()
        made.append(
            Trace(
                prompt=tuple(draw(st.sampled_from(prompts))),
                completion=tuple(completion),
                span_lengths=tuple(b - a for a, b in pairwise(cu)),
                group=draw(st.integers(-5, 5)),
                source=draw(st.sampled_from(list(Source))),
            )
        )
    return made


@searched
@given(made=traces(), shared=st.booleans(), lone=st.booleans())
def test_unpacking_gives_the_traces_back(made, shared, lone):
    batch = pack(made, share_prompts=shared, lone_prompts=lone)
    assert batch.unpack() == made
    assert batch.targets.tolist() == [token for trace in made for token in trace.completion]
    total = sum(trace.num_tokens for trace in made)
    assert batch.num_tokens == total if not shared else batch.num_tokens <= total


@searched
@given(made=traces(), extra=st.integers(0, 20), ranks=st.integers(1, 3), shared=st.booleans())
def test_a_plan_is_a_partition_within_the_budget(made, extra, ranks, shared):
    budget = max(trace.num_tokens for trace in made) + extra
    plan = plan_traces(made, budget, ranks=ranks, share_prompts=shared)
    assert sorted(i for part in plan for i in part) == list(range(len(made)))
    for part in plan:
        assert part
        packed = pack([made[i] for i in part], share_prompts=shared)
        assert packed.num_tokens <= budget
    lengths = [trace.num_tokens for trace in made]
    alone = plan_micro_batches(lengths, budget)
    assert sorted(i for part in alone for i in part) == list(range(len(made)))
    assert all(sum(lengths[i] for i in part) <= budget for part in alone)


@searched
@given(
    text=st.text(alphabet=CHARACTERS, min_size=1, max_size=40),
    granularity=st.sampled_from(["dense", "interval", "step", "sparse"]),
    interval=st.integers(1, 50),
    boundary=st.sampled_from(["\n", "[0-9]", ";", " +", "a|b"]),
)
def test_spans_cover_the_completion_and_rewards_lie_at_their_ends(
    text, granularity, interval, boundary
):
    ids = TOKENIZER(text).input_ids
    rule = span_rule(granularity, interval=interval, boundary=boundary, tokenizer=TOKENIZER)
    lengths = rule(ids)
    assert min(lengths) >= 1
    assert sum(lengths) == len(ids)
    offsets = span_offsets(ids, lengths, TOKENIZER)
    assert "".join(text[a:b] for a, b in offsets) == text
    rewards = tuple(float(i + 1) for i in range(len(lengths)))
    given_ = SpanRewards(lengths=lengths, values=rewards, scored=SimpleNamespace())
    of_tokens = given_.of_tokens()
    ends = [end - 1 for end in accumulate(lengths)]
    assert [of_tokens[end] for end in ends] == list(rewards)
    assert sum(of_tokens) == sum(rewards)


@searched
@given(
    ids=st.lists(st.one_of(st.integers(-5, 70), int64s), max_size=5),
    lengths=st.lists(st.integers(-2, 6), max_size=4),
)
def test_random_traces_are_packed_rightly_or_refused(ids, lengths):
    valid = bool(ids) and min(ids) >= 0 and sum(lengths) == len(ids) and min(lengths) >= 1
    made = {"prompt": (3,), "completion": tuple(ids), "span_lengths": tuple(lengths)}
    if valid:
        trace = Trace(**made)
        assert pack([trace]).unpack() == [trace]
    else:
        with pytest.raises(ValueError, match="expected Trace"):
            Trace(**made)
