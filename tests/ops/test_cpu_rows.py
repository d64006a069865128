"""The C++ row kernels on every vector path and element type, and under the sanitizers."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from airl_fast import _C
from tests import oracle

CSRC = Path(__file__).parents[2] / "csrc"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HEADS = [{}, {"temperature": 0.7, "softcap": 3.0, "logit_scale": 1.3}]


def read(a, targets, bias=None, entropy=True, threads=1, columns=None, **head):
    """logp and entropy by the kernel, and what it needs to be differentiated."""
    temperature, softcap, scale = (
        head.get(name, default)
        for name, default in (("temperature", 1.0), ("softcap", None), ("logit_scale", 1.0))
    )
    stats, logp = torch.full((len(a), 4), math.nan).double(), torch.full((len(a),), math.nan)
    h = torch.full((len(a),), math.nan)
    options = (
        0 if bias is None else bias.data_ptr(),
        scale / (softcap or temperature),
        softcap / temperature if softcap else 0.0,
        scale / temperature,
    )
    chunk = (a.data_ptr(), a.stride(0), len(a), a.shape[1], ELEMENTS[a.dtype])
    at = targets.data_ptr()
    results = (stats.data_ptr(), logp.data_ptr(), h.data_ptr() if entropy else 0)
    for first in range(0, a.shape[1], columns or a.shape[1]):
        part = a[:, first:][:, :columns]
        piece = (part.data_ptr(), a.stride(0), len(a), part.shape[1], ELEMENTS[a.dtype])
        ahead = options[0] and options[0] + 4 * first
        _C.read_rows(piece, (ahead, *options[1:]), at, first, threads, *results)
    return logp, h, (chunk, options, at, 0, threads, stats.data_ptr()), stats


def exact(a, targets, bias, **head):
    """The oracle on logits: a head whose hidden states are a, and whose weight is 1."""
    one = torch.eye(a.shape[1])
    return oracle.linear_logprob(a, one, targets, bias=bias, **head)


def inputs(vocab, rows=5, dtype=torch.float32, magnitude=1.0):
    g = torch.Generator().manual_seed(vocab)
    a = (torch.randn(rows, vocab + 3, generator=g) * magnitude).to(dtype)[:, :vocab]
    bias, targets = torch.randn(vocab, generator=g), torch.randint(vocab, (rows,), generator=g)
    return a, bias, targets, torch.randn(2, rows, generator=g)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 40.0])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "all"])
# One logit, less than a vector, a whole one, an odd tail, one logit more than a block.
@pytest.mark.parametrize("vocab", [1, 3, 16, 1031, 2049])
def test_values_and_gradients_match_the_oracle(vocab, head, magnitude, dtype, path):
    a, bias, targets, upstream = inputs(vocab, dtype=dtype, magnitude=magnitude)
    leaf = a.double().requires_grad_()
    truth = exact(leaf, targets, bias, **head)
    (gradient,) = torch.autograd.grad(truth, leaf, list(upstream.double()))
    logp, entropy, call, _ = read(a, targets, bias, **head)
    # z is rounded to float32 a few times, to within a few units of its own size.
    tolerance = 4e-7 * max(8.0, 4 * magnitude)
    torch.testing.assert_close(logp.double(), truth[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=0, atol=tolerance)
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    beyond = a.as_strided((len(a), 3), a.stride(), vocab)[:-1].clone()
    _C.differentiate_rows(*call, *(u.data_ptr() for u in upstream), a.data_ptr())
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(a.double(), gradient, rtol=rounding, atol=4 * tolerance)
    assert torch.equal(a.as_strided((len(a), 3), a.stride(), vocab)[:-1], beyond)


@pytest.mark.parametrize("columns", [1, 700, 2048, 4999])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "all"])
def test_columns_read_one_part_after_the_other(head, columns, path):
    a, bias, targets, _ = inputs(5000, rows=3)
    truth = exact(a, targets, bias, **head)
    for got, expected in zip(read(a, targets, bias, columns=columns, **head), truth, strict=False):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 700, 2048])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "all"])
def test_columns_differentiated_one_part_after_the_other_into_other_memory(head, columns, path):
    a, bias, targets, upstream = inputs(2500, rows=3)
    leaf = a.double().requires_grad_()
    truth = exact(leaf, targets, bias, **head)
    (gradient,) = torch.autograd.grad(truth, leaf, list(upstream.double()))
    kept = a.clone()
    _, _, (chunk, options, *_), stats = read(a, targets, bias, **head)
    out = torch.full((3, a.stride(0)), math.nan)[:, :2500]
    for first in range(0, 2500, columns):
        part = (a[:, first:].data_ptr(), chunk[1], 3, min(columns, 2500 - first), 0)
        ahead = (bias[first:].data_ptr(), *options[1:])
        where = (targets.data_ptr(), first, 1, stats.data_ptr())
        given = (u.data_ptr() for u in upstream)
        _C.differentiate_rows(part, ahead, *where, *given, out[:, first:].data_ptr())
    torch.testing.assert_close(out.double(), gradient, rtol=0, atol=1e-5)
    assert torch.equal(a, kept)


@pytest.mark.parametrize("columns", [1, 7, 2049, 5000])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "all"])
@pytest.mark.parametrize("magnitude", [1.0, 40.0])
def test_weights_add_up_to_the_gradient_at_the_hidden_states(magnitude, head, columns, path):
    a, bias, targets, upstream = inputs(5000 if columns > 7 else 50, rows=7, magnitude=magnitude)
    weight = torch.randn(a.shape[1], 3, generator=torch.Generator().manual_seed(1)).double()
    leaf = a.double().requires_grad_()
    truth = exact(leaf, targets, bias, **head)
    (expected,) = torch.autograd.grad(truth[0] @ upstream[0].double(), leaf)
    logp, entropy, tangent = torch.full((3, 7), math.nan)
    sums, stats = torch.full((7, 3), math.nan), torch.full((7, 4), math.nan).double()
    cap, t, scale = head.get("softcap"), head.get("temperature", 1.0), head.get("logit_scale", 1.0)
    options = (scale / (cap or t), cap / t if cap else 0.0, scale / t)
    for first in range(0, a.shape[1], columns):
        part = a[:, first:][:, :columns].contiguous()
        _C.weigh_rows(
            (part.data_ptr(), part.shape[1], 7, part.shape[1], 0),
            (bias.data_ptr() + 4 * first, *options),
            targets.data_ptr(),
            first,
            2,
            *(x.data_ptr() for x in (stats, logp, entropy, tangent, sums)),
            3,
        )
        assert (part >= 0).all()
        assert (part <= 1).all()
        added = part.double() @ weight[first:][:columns]
        sums = (added if first == 0 else sums + added).float()
    tolerance = 4e-7 * max(8.0, 4 * magnitude)
    torch.testing.assert_close(logp.double(), truth[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=0, atol=tolerance)
    largest, total, _, target = stats.unbind(1)
    others = tangent * (1 - (target - largest).exp() / total)
    gradient = others[:, None] * weight[targets] - sums / total[:, None]
    got = options[2] * upstream[0].double()[:, None] * gradient
    torch.testing.assert_close(got, expected @ weight, rtol=0, atol=10 * tolerance)


def test_the_log_probability_does_not_depend_on_the_entropy_nor_on_threads(path):
    a, bias, targets, upstream = inputs(5000, rows=37)
    results = []
    for entropy, threads in ((True, 1), (False, 1), (True, 2), (True, 5)):
        copy = a.clone()
        logp, _, call, _ = read(copy, targets, bias, entropy=entropy, threads=threads)
        _C.differentiate_rows(*call, upstream.data_ptr(), 0, copy.data_ptr())
        results.append((logp, copy))
    for logp, gradient in results[1:]:
        assert torch.equal(logp, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("column", [0, 2047, 2048, 4999])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(value, column, path):
    a, _, targets, _ = inputs(5000)
    a[1] = -math.inf
    a[1, column] = a[2, column] = value
    a[3] = value
    logp, entropy, _, _ = read(a, targets)
    assert logp.isfinite().tolist() == [True, False, False, False, True]
    assert entropy.isfinite().tolist() == [True, False, False, False, True]


def test_masked_tokens_leave_the_log_probability_right(path):
    a, _, targets, _ = inputs(5000)
    a[:, :2500] = -math.inf  # more than a block, before anything finite
    targets = targets % 2500 + 2500
    logp, _, _, _ = read(a, targets, entropy=False)
    expected, _ = exact(a[:, 2500:], targets - 2500, None)
    torch.testing.assert_close(logp.double(), expected)


def test_rising_maxima_and_huge_logits(path):
    a = torch.linspace(-1e4, 1e4, 6000).repeat(2, 1)
    a[1, -3000:] = 1e4
    targets = torch.tensor([5999, 5000])
    logp, entropy, _, _ = read(a, targets)
    expected = exact(a, targets, None)
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-6)
    assert logp[1] == -entropy[1] == torch.tensor(-math.log(3000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_stored_to_nearest_even(dtype, path):
    """A target with p = 1/2 and d_logp = 2 g stores g: every rounding case of the format."""
    steps = torch.finfo(dtype).eps * torch.tensor([0.5, 1.5, 0.49, 0.51, 0.75])
    wanted = torch.cat([1 + steps, -(1 + steps), (1 + steps) * torch.finfo(dtype).tiny / 2])
    a = torch.zeros(len(wanted), 2, dtype=dtype)
    targets = torch.zeros(len(wanted), dtype=torch.int64)
    _, _, call, _ = read(a, targets)
    upstream = 2 * wanted
    _C.differentiate_rows(*call, upstream.data_ptr(), 0, a.data_ptr())
    assert torch.equal(a, torch.stack([wanted, -wanted], 1).to(dtype))


def test_an_unknown_vector_path_is_refused():
    with pytest.raises(ValueError, match="'sse9' is not available"):
        _C.use_vector_path("sse9")


HARNESS = Path(__file__).with_name("rows_harness.cpp")


def test_the_kernels_are_clean_under_the_sanitizers(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ to compile the kernels with")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = subprocess.run(
        [compiler, *sanitize, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    )
    if linked.returncode != 0:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    program = tmp_path / "harness"
    sources = [str(f) for f in sorted(CSRC.glob("*.cpp")) if "bindings" not in f.name]
    flags = ["-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    build = [compiler, *flags, *sanitize, "-pthread", f"-I{CSRC}", str(HARNESS), *sources, "-ldl"]
    subprocess.run([*build, "-o", str(program)], check=True)
    subprocess.run([str(program)], check=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
