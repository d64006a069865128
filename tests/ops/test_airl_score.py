"""Scoring against the oracle: both discriminator heads, shaping, and what is refused."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import airl_fast
from airl_fast import AIRLScore, airl_score, linear_logprob
from airl_fast.ops import _head
from tests import oracle

pytestmark = pytest.mark.usefixtures("served_by")

CU_SPANS = torch.tensor([0, 1, 4, 5, 9, 11], dtype=torch.int32)
CU_SEQ_SPANS = torch.tensor([0, 1, 5], dtype=torch.int32)
VOCAB = 17


def inputs(
    n: int = 11,
    vocab: int = VOCAB,
    rows: int | None = 1,
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """Hidden, weight, targets, disc_hidden and disc_weight; rows None means one per token."""
    g = torch.Generator().manual_seed(n + vocab)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * magnitude).to(dtype)

    targets = torch.randint(vocab, (n,), generator=g)
    return normal(n, 5), normal(vocab, 5), targets, normal(n, 7), normal(rows or vocab, 7)


def check(args, cu_spans=CU_SPANS, tolerance=2e-6, **options) -> AIRLScore:
    """Compare all four results with the oracle, relative to the largest value of each."""
    got = airl_score(*args, cu_spans, **options)
    expected = oracle.airl_score(*args, cu_spans, **options)
    for name in AIRLScore._fields:
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == torch.float32
        assert not a.requires_grad
        bound = tolerance * max(1.0, *(x.abs().max().item() for x in expected if x.numel()))
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=bound, msg=name)
    return got


HEADS = {
    "score": (1, {}),
    "score with bias": (1, {"disc_bias": torch.tensor([0.3])}),
    "score with a number": (1, {"disc_bias": 0.3}),
    "shaped": (2, {"shaping_gamma": 0.9, "cu_seq_spans": CU_SEQ_SPANS}),
    "shaped with bias": (
        2,
        {
            "shaping_gamma": 1.0,
            "cu_seq_spans": CU_SEQ_SPANS,
            "disc_bias": torch.tensor([0.3, -2.0]),
        },
    ),
    "lm": (None, {"disc_head": "lm"}),
    "lm scaled": (None, {"disc_head": "lm", "disc_scale": 0.7, "disc_bias": -0.2}),
    "lm scaled by tensors": (
        None,
        {"disc_head": "lm", "disc_scale": torch.tensor(0.7), "disc_bias": torch.tensor(-0.2)},
    ),
}
POLICY = [
    {},
    {"temperature": 0.6},
    {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.3},
    {"bias": torch.linspace(-1, 1, VOCAB)},
]


@pytest.mark.parametrize("policy", POLICY, ids=["plain", "temperature", "softcap", "bias"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ["airl", "logit"])
@pytest.mark.parametrize("span_logp", ["sum", "mean"])
def test_equals_the_oracle(head, policy, form, span_logp):
    rows, options = HEADS[head]
    got = check(inputs(rows=rows), form=form, span_logp=span_logp, **options, **policy)
    if form == "logit":
        assert torch.equal(got.reward, got.f)
        assert got.reward.data_ptr() != got.f.data_ptr()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(head, dtype, refuses):
    rows, options = HEADS[head]
    args = inputs(rows=rows, dtype=dtype)
    if refuses(dtype, lambda: airl_score(*args, CU_SPANS, **options)):
        return
    check(args, **options)


@pytest.mark.parametrize("head", ["score", "lm"])
@pytest.mark.parametrize("vocab", [1, 7, 257])
def test_odd_vocabularies(head, vocab):
    rows, options = HEADS[head]
    check(inputs(rows=rows, vocab=vocab), **options)


def test_many_chunks(monkeypatch):
    monkeypatch.setattr(_head, "CHUNK_BYTES", 3 * VOCAB * 4)
    rows, options = HEADS["lm scaled"]
    check(inputs(rows=rows), **options)


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_ten_thousand(head):
    rows, options = HEADS[head]
    args = inputs(rows=rows, magnitude=70.0)
    assert (args[0] @ args[1].T).abs().max() > 1e4
    got = check(args, **options)
    assert (got.logp <= 0).all()
    assert (got.entropy >= 0).all()


def test_a_copied_language_model_has_a_reward_of_exactly_zero():
    hidden, weight, targets, _, _ = inputs()
    copied = (hidden, weight, targets, hidden, weight, CU_SPANS)
    for policy in POLICY:
        got = airl_score(*copied, disc_head="lm", **(policy | {"temperature": 1.0}))
        assert torch.equal(got.reward, torch.zeros(5))


def test_f_does_not_depend_on_the_temperature_of_the_policy():
    args = inputs(rows=None)
    cold, warm = (airl_score(*args, CU_SPANS, disc_head="lm", temperature=t) for t in (0.5, 1.5))
    assert torch.equal(cold.f, warm.f)
    assert not torch.allclose(cold.logp, warm.logp)


def test_sequence_offsets_are_not_read_without_shaping():
    args = inputs()
    got = airl_score(*args, CU_SPANS, cu_seq_spans=CU_SEQ_SPANS)
    assert torch.equal(got.reward, airl_score(*args, CU_SPANS).reward)


def test_log_probs_are_those_of_linear_logprob():
    args = inputs()
    logp, entropy = linear_logprob(*args[:3], return_entropy=True)
    got = airl_score(*args, CU_SPANS)
    assert torch.equal(got.logp, logp)
    assert torch.equal(got.entropy, entropy)


def test_shaping_without_discount_telescopes():
    """With gamma 1 and h 0 at both ends, shaping moves reward about and adds none."""
    args = inputs(rows=2)
    shaped = airl_score(*args, CU_SPANS, shaping_gamma=1.0, cu_seq_spans=CU_SEQ_SPANS).f
    plain = airl_score(*args[:4], args[4][:1], CU_SPANS).f
    sums = [airl_fast.segment_sum(f, CU_SEQ_SPANS) for f in (shaped, plain)]
    torch.testing.assert_close(*sums)
    assert not torch.allclose(shaped, plain)


def test_empty_batch():
    none = torch.zeros(1, dtype=torch.int32)
    for rows, options in HEADS.values():
        shaped = {"cu_seq_spans": none} if "cu_seq_spans" in options else {}
        got = airl_score(*inputs(n=0, rows=rows), none, **(options | shaped))
        assert [len(x) for x in got] == [0, 0, 0, 0]


@pytest.mark.parametrize("head", HEADS)
def test_strided_and_expanded_inputs(head):
    rows, options = HEADS[head]
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs(rows=rows)]
    cu_spans = torch.stack([CU_SPANS, CU_SPANS], dim=-1)[:, 0]
    check(strided, cu_spans, **options)
    hidden, weight, targets, disc_hidden, disc_weight = inputs(rows=rows)
    expanded = (hidden[:1].expand(11, -1), weight, targets, disc_hidden[:1].expand(11, -1))
    check((*expanded, disc_weight), **options)


def test_no_gradient_reaches_any_input_and_autocast_changes_nothing():
    args = [x.requires_grad_() if x.is_floating_point() else x for x in inputs()]
    got = airl_score(*args, CU_SPANS)
    assert not any(x.requires_grad for x in got)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(airl_score(*args, CU_SPANS), got, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("head", ["score", "shaped with bias", "lm scaled"])
def test_opcheck_and_compiled_equals_eager(head):
    rows, options = HEADS[head]
    args = inputs(rows=rows)
    torch.compiler.reset()  # each case is a program of its own
    compiled = torch.compile(airl_score, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(*args, CU_SPANS, **options), airl_score(*args, CU_SPANS, **options), strict=True
    ):
        assert torch.equal(a, b)
    bias = None if "disc_bias" not in options else torch.ones(rows or 1)
    tensors, policy = (
        (None, bias, torch.ones(1)),
        (options.get("disc_head", "score"), 0.9, 3.0, 1.0),
    )
    shaping = (options.get("shaping_gamma"), options.get("cu_seq_spans"))
    torch.library.opcheck(
        torch.ops.airl_fast.airl_score.default,
        (*args, CU_SPANS, *tensors, *policy, "sum", "airl", *shaping),
    )


SHAPING = {"shaping_gamma": 0.9, "cu_seq_spans": CU_SEQ_SPANS}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1, {"disc_head": "linear"}, "disc_head to be one of 'score', 'lm', received 'linear'"),
        (1, {"span_logp": "max"}, "span_logp to be one of"),
        (1, {"form": "wgan"}, "form to be one of 'airl', 'logit'"),
        (3, {}, "disc_weight of 1 or 2 rows, received shape \\(3, 7\\)"),
        (2, {"disc_head": "lm"}, "disc_weight of 17 rows"),
        (1, {"disc_scale": 2.0}, "disc_scale goes with disc_head='lm'"),
        (1, SHAPING, "goes with a score head of two rows .* received 0.9 .* with 1 rows"),
        (None, SHAPING | {"disc_head": "lm"}, "received 0.9 for disc_head='lm' with 17 rows"),
        (2, {"cu_seq_spans": CU_SEQ_SPANS}, "received None for disc_head='score' with 2 rows"),
        (2, {"shaping_gamma": 0.9}, "shaping needs cu_seq_spans"),
        (2, SHAPING | {"shaping_gamma": 1.5}, "shaping_gamma in \\[0, 1\\], received 1.5"),
        (2, SHAPING | {"cu_seq_spans": CU_SPANS}, "cu_seq_spans to run from 0 to 5, .* 0 to 11"),
        (2, SHAPING | {"disc_bias": 0.1}, "disc_bias to hold 2 number"),
        (None, {"disc_head": "lm", "disc_bias": torch.zeros(17)}, "disc_bias to hold 1 number"),
        (None, {"disc_head": "lm", "disc_scale": torch.ones(2)}, "disc_scale to hold 1 number"),
        (1, {"temperature": 0.0}, "temperature"),
    ],
)
def test_option_errors_say_what_was_received(rows, options, message):
    with pytest.raises(ValueError, match=message):
        airl_score(*inputs(rows=rows), CU_SPANS, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((11,), -100)}, "a token id for every action, received -100"),
        ({"targets": torch.full((11,), 17)}, "targets"),
        ({"disc_hidden": torch.zeros(10, 7)}, "disc_hidden of shape \\(11, 7\\)"),
        ({"disc_hidden": torch.zeros(11, 6)}, "received \\(11, 6\\)"),
        ({"disc_hidden": torch.full((11, 7), torch.nan)}, "finite f .* received nan at index 0"),
        ({"disc_weight": torch.ones(1, 7).int()}, "disc_weight to be floating point"),
        ({"cu_spans": CU_SPANS - 1}, "cu_spans to run from 0 to 11"),
        ({"cu_spans": CU_SPANS.clamp(max=5)}, "cu_spans to run from 0 to 11"),
        ({"cu_spans": CU_SPANS.where(CU_SPANS != 4, 1)}, "span 1 of cu_spans is empty"),
        ({"cu_spans": CU_SPANS.long()}, "cu_spans to hold int32 offsets"),
        ({"hidden": torch.zeros(11, 17)}, "hidden"),
    ],
)
def test_input_errors_say_what_was_received(change, message):
    names = ("hidden", "weight", "targets", "disc_hidden", "disc_weight")
    arguments = dict(zip(names, inputs(), strict=True)) | {"cu_spans": CU_SPANS} | change
    with pytest.raises(ValueError, match=message):
        airl_score(**arguments)


# The backend is the same for every example.
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    head=st.sampled_from(["score", "lm scaled"]),
    span_logp=st.sampled_from(["sum", "mean"]),
)
def test_spans_do_not_see_each_other(lengths, head, span_logp):
    rows, options = HEADS[head]
    n, cu = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    hidden, weight, targets, disc_hidden, disc_weight = inputs(n, rows=rows)
    options = options | {"span_logp": span_logp}
    whole = check((hidden, weight, targets, disc_hidden, disc_weight), cu, **options)
    for s, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        piece = (hidden[a:b], weight, targets[a:b], disc_hidden[a:b], disc_weight)
        alone = airl_score(*piece, torch.tensor([0, b - a]).int(), **options)
        torch.testing.assert_close(alone.reward, whole.reward[s : s + 1], rtol=1e-5, atol=1e-5)
