"""Discriminator loss against the oracle, gradients and statistics included."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airl_fast import DiscriminatorStats, discriminator_loss
from tests import oracle

pytestmark = pytest.mark.usefixtures("served_by")

FORMS = ("airl", "logit", "wgan")
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"temperature": 2.5},
    {"label_smoothing": 0.3, "temperature": 0.5, "weight": True},
    {"weight": True},
]


def spans(n: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0):
    """f, logp (at most 0), is_expert and weights, some of them 0."""
    g = torch.Generator().manual_seed(n)
    f, logp, weight = torch.randn(3, n, generator=g, dtype=torch.float64) * magnitude
    is_expert = torch.arange(n) % 3 == 0
    return f.to(dtype), -logp.abs().to(dtype), is_expert, weight.relu().to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    eps = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), expected.double(), rtol=eps, atol=eps * scale)


def allowed(form: str, options: dict) -> bool:
    return form != "wgan" or not {"label_smoothing", "temperature"} & options.keys()


EVERY = [(form, options) for form in FORMS for options in OPTIONS if allowed(form, options)]


@pytest.mark.parametrize(("form", "options"), EVERY)
@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_equals_the_oracle_in_value_and_gradient(form, options, n, magnitude):
    f, logp, is_expert, weight = spans(n, magnitude=magnitude)
    options = options | ({"weight": weight + (n < 3)} if "weight" in options else {})
    f.requires_grad_(), logp.requires_grad_()
    loss, _ = discriminator_loss(f, logp, is_expert, form=form, **options)
    expected, _ = oracle.discriminator_loss(f, logp, is_expert, form=form, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    close(loss, expected, scale=magnitude)
    inputs = (f, logp) if form == "airl" else (f,)
    got = torch.autograd.grad(loss, inputs, torch.tensor(-3.0))
    want = torch.autograd.grad(expected, inputs, torch.tensor(-3.0).double())
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_statistics(form):
    f, logp, is_expert, weight = spans(33)
    _, stats = discriminator_loss(f, logp, is_expert, form=form, weight=weight)
    _, expected = oracle.discriminator_loss(f, logp, is_expert, form=form, weight=weight)
    for name, value in expected.items():
        close(getattr(stats, name), torch.tensor(value))
    logits = f - logp if form == "airl" else f
    close(stats.accuracy_expert, (logits[is_expert] > 0).double().mean())
    close(stats.accuracy_policy, (logits[~is_expert] <= 0).double().mean())
    close(stats.mean_f_expert, f[is_expert].mean())
    close(stats.mean_f_policy, f[~is_expert].mean())
    close(stats.mean_logit_expert, logits[is_expert].mean())
    close(stats.mean_logit_policy, logits[~is_expert].mean())
    d = logits.double().sigmoid()
    close(stats.d_entropy, -(d * d.log() + (1 - d) * (1 - d).log()).mean())


def test_statistics_are_detached_scalars_and_nan_over_nothing():
    f, logp, _, _ = spans(5)
    f.requires_grad_()
    _, stats = discriminator_loss(f, logp, torch.ones(5, dtype=torch.bool))
    assert isinstance(stats, DiscriminatorStats)
    for name, value in stats._asdict().items():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert math.isnan(value) == name.endswith("policy")


def test_an_undecided_discriminator():
    """At f = log pi, D is 1/2: loss log 2, entropy log 2, and a vote for the policy."""
    logp, is_expert = -torch.rand(6), torch.arange(6) < 3
    loss, stats = discriminator_loss(logp, logp, is_expert)
    close(loss, torch.tensor(math.log(2)))
    close(stats.d_entropy, torch.tensor(math.log(2)))
    assert stats.accuracy == 0.5
    assert stats.accuracy_expert == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_go_to_exactly_the_inputs_that_require_them(form):
    f, logp, is_expert, _ = spans(5)
    f.requires_grad_()
    discriminator_loss(f, logp, is_expert, form=form)[0].backward()
    assert f.grad is not None
    assert logp.grad is None
    f, logp, is_expert, _ = spans(5)
    logp.requires_grad_()
    if form == "airl":
        discriminator_loss(f, logp, is_expert, form=form)[0].backward()
        assert f.grad is None
        assert logp.grad is not None
    assert not discriminator_loss(f, logp.detach(), is_expert, form=form)[0].requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(form, dtype):
    f, logp, is_expert, weight = spans(9, dtype)
    f.requires_grad_()
    loss, _ = discriminator_loss(f, logp.float(), is_expert, form=form, weight=weight)
    close(loss, oracle.discriminator_loss(f, logp, is_expert, form=form, weight=weight)[0])
    loss.backward()
    assert f.grad is not None
    assert f.grad.dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_empty_strided_and_expanded(form):
    f, logp, is_expert, weight = spans(0)
    f.requires_grad_()
    loss, stats = discriminator_loss(f, logp, is_expert, form=form, weight=weight)
    assert loss == 0
    assert stats.accuracy.isnan()
    loss.backward()
    assert f.grad is not None
    f, logp, is_expert, weight = (torch.stack([x, x], dim=1)[:, 0] for x in spans(7))
    expanded = torch.tensor([0.4]).expand(7).requires_grad_()
    for x in (f, expanded):
        loss, _ = discriminator_loss(x, logp, is_expert, form=form, weight=weight)
        close(loss, oracle.discriminator_loss(x, logp, is_expert, form=form, weight=weight)[0])
    loss.backward()
    assert expanded.grad is not None


@pytest.mark.parametrize("expert", [True, False])
def test_a_class_that_is_absent_counts_as_zero_in_the_critic(expert):
    f, logp, _, _ = spans(4)
    loss, _ = discriminator_loss(f, logp, torch.full((4,), expert), form="wgan")
    close(loss, -f.mean() if expert else f.mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(form, dtype):
    f, logp, is_expert, weight = spans(5, dtype)
    op = torch.ops.airl_fast.discriminator_loss.default
    args = (f.requires_grad_(), logp.requires_grad_(), is_expert)
    torch.library.opcheck(op, (*args, weight, form, 0.0, 1.0))
    torch.library.opcheck(op, (*args, None, form, 0.0, 1.0))


@pytest.mark.parametrize(("form", "options"), EVERY)
def test_compiled_equals_eager_without_graph_breaks(form, options):
    torch.compiler.reset()  # each case is a program of its own
    f, logp, is_expert, weight = spans(9)
    options = options | ({"weight": weight} if "weight" in options else {})

    def loss(f):
        loss, stats = discriminator_loss(f, logp, is_expert, form=form, **options)
        return loss * 2, stats.accuracy

    f.requires_grad_()
    eager = loss(f)
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")(f)
    torch.testing.assert_close(eager, traced)
    torch.testing.assert_close(*(torch.autograd.grad(y[0], f)[0] for y in (eager, traced)))


def test_second_derivatives():
    f, logp, is_expert, weight = spans(6, torch.float64)
    f.requires_grad_()
    hessian = []
    for loss in (discriminator_loss, oracle.discriminator_loss):
        value = loss(f, logp, is_expert, weight=weight)[0]
        (gradient,) = torch.autograd.grad(value, f, create_graph=True)
        hessian.append(torch.autograd.grad(gradient.square().sum(), f)[0])
    close(*hessian)


F, LOGP, IS_EXPERT, WEIGHT = spans(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "gan"}, "form to be one of 'airl', 'logit', 'wgan', received 'gan'"),
        ({"label_smoothing": 1.0}, "label_smoothing in \\[0, 1\\), received 1.0"),
        ({"temperature": 0.0}, "temperature above 0, received 0.0"),
        ({"form": "wgan", "temperature": 2.0}, "neither labels to smooth nor a temperature"),
        ({"form": "wgan", "label_smoothing": 0.1}, "leave both out"),
        ({"weight": torch.zeros(4)}, "some above it, received 0.0 to 0.0"),
        ({"weight": torch.tensor([1.0, -1, 1, 1])}, "received -1.0 to 1.0"),
        ({"weight": WEIGHT[:3]}, "weight of shape \\(4,\\)"),
        ({"logp": LOGP[:3]}, "logp of shape \\(4,\\) on cpu, as f is, received \\(3,\\)"),
        ({"is_expert": IS_EXPERT.int()}, "is_expert to be bool .* received torch.int32"),
        ({"is_expert": IS_EXPERT[:2]}, "received torch.bool of shape \\(2,\\)"),
        ({"f": F.log()}, "expected finite f, received nan"),
        ({"logp": LOGP / 0}, "expected finite logp, received -inf at index 0"),
        ({"f": F[:, None]}, "f to be one-dimensional"),
    ],
)
def test_errors_say_what_was_received(arguments, message):
    defaults = {"f": F, "logp": LOGP, "is_expert": IS_EXPERT}
    with pytest.raises(ValueError, match=message):
        discriminator_loss(**(defaults | arguments))


finite = st.floats(-1e4, 1e4, width=32)


# The backend is the same for every example.
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(finite, finite, st.booleans()), min_size=1, max_size=12))
def test_properties(rows):
    f, logp, is_expert = (torch.tensor(column) for column in zip(*rows, strict=True))
    loss, stats = discriminator_loss(f, logp, is_expert)
    assert loss.isfinite()
    assert loss >= 0
    assert -1e-6 <= stats.d_entropy <= math.log(2) + 1e-6
    for d in (stats.d_expert, stats.d_policy, stats.accuracy):
        assert d.isnan() or 0 <= d <= 1
    # Swapping the classes and the sign of the logit changes nothing.
    mirrored, _ = discriminator_loss(-f, -logp, ~is_expert)
    close(mirrored, loss)
    # Weights of a whole number act as repeated spans.
    weight = torch.arange(1.0, len(rows) + 1)
    repeats = weight.long()
    again = [x.repeat_interleave(repeats) for x in (f, logp, is_expert)]
    close(discriminator_loss(f, logp, is_expert, weight=weight)[0], discriminator_loss(*again)[0])
