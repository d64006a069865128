"""Matrix products on AMX's tiles against float64, with torch's own float32 error as the measure."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airl_fast import _C, backend
from airl_fast.ops import _cpu_products as products
from airl_fast.ops._cpu_products import Factor, Norm

needs_tiles = pytest.mark.skipif(not _C.products_ready(), reason="needs a processor with AMX")
DTYPES = torch.float32, torch.bfloat16
SHAPES = [(256, 32, 64), (300, 33, 65), (257, 1025, 70), (333, 2100, 97), (1030, 96, 515)]


def matrix(rows, columns, transposed, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if transposed else (rows, columns)
    x = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp2()
    return (x.t() if transposed else x).to(dtype)


def error(found, a, b):
    """Largest error of a product, over what its terms' sizes add up to."""
    a, b = a.double(), b.double()
    return ((found.double() - a @ b).abs() / (a.abs() @ b.abs())).max().item()


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)))
def test_as_exact_as_torch(shape, transposed, dtypes):
    m, k, n = shape
    a = matrix(m, k, transposed[0], dtypes[0], seed=0)
    b = matrix(k, n, transposed[1], dtypes[1], seed=1)
    assert products.serves(a, b) is None
    # In a larger matrix, whose other elements stay what they are.
    around = torch.full((m + 2, n + 3), float("nan"))
    out = around[1:-1, 1 : n + 1]
    products.multiply(a, b, out)
    theirs = error(a.float() @ b.float(), a, b)
    assert error(out, a, b) <= 2 * max(theirs, 6e-8)  # a unit in the last place
    outside = torch.ones_like(around, dtype=torch.bool)
    outside[1:-1, 1 : n + 1] = False
    assert around[outside].isnan().all()
    assert out.isfinite().all()
    products.multiply(a, b, out, add=True)
    assert error(out / 2, a, b) <= 2 * max(theirs, 6e-8)


@needs_tiles
def test_parts_follow_torchs_precision():
    a, b = matrix(256, 512, False, torch.float32, 0), matrix(512, 64, False, torch.float32, 1)
    out, errors = torch.empty(256, 64), {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            products.multiply(a, b, out)
            errors[precision] = error(out, a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    # A part has 8 bits: what is left out is 2^-26, 2^-17 and 2^-8 of a term, or a few of them.
    assert errors["highest"] < 2**-21
    assert 2**-21 < errors["high"] < 2**-15
    assert 2**-13 < errors["medium"] < 2**-7


@needs_tiles
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_rows_bits_depend_on_nothing_else(data):
    k, n = data.draw(st.sampled_from([(96, 64), (576, 200), (1100, 65)]))
    a, b = matrix(900, k, False, torch.float32, 0), matrix(k, n, False, torch.float32, 1)
    whole = torch.empty(900, n)
    products.multiply(a, b, whole)
    start = data.draw(st.integers(0, 900 - 256))
    stop = data.draw(st.integers(start + 256, 900))
    part = torch.empty(stop - start, n)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 4)))
        products.multiply(a[start:stop], b, part)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(part, whole[start:stop])


@needs_tiles
def test_what_is_not_finite_stays_in_its_row_and_column():
    a, b = matrix(256, 64, False, torch.float32, 0), matrix(64, 96, False, torch.float32, 1)
    a[3, 5], b[7, 11] = float("inf"), float("nan")
    out = torch.empty(256, 96)
    products.multiply(a, b, out)
    finite = torch.ones_like(out, dtype=torch.bool)
    finite[3], finite[:, 11] = False, False
    assert torch.equal(out.isfinite(), finite)


@needs_tiles
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients(bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 100, 80, generator=generator, requires_grad=True)
    weight = torch.randn(70, 80, generator=generator, requires_grad=True)
    offset = torch.randn(70, generator=generator, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, offset) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]

    def gradients(linear, inputs):
        y = linear(*inputs)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [y, *first, *second]

    expected = gradients(torch.nn.functional.linear, wide)
    for found, want in zip(gradients(products.linear, inputs), expected, strict=True):
        assert (found.double() - want).abs().max() <= 1e-5 * want.abs().max()


@needs_tiles
@pytest.mark.parametrize("inner", [64, 576, 1536])
def test_norm_gate_and_residual(inner):
    x = matrix(301, inner, False, torch.float32, 0)
    b, c = (matrix(inner, 97, True, torch.float32, seed) for seed in (1, 2))
    norm = Norm(torch.rand(inner, generator=torch.Generator().manual_seed(3)) + 0.5, 1e-5)
    plus, bias = matrix(301, 97, False, torch.float32, 4), torch.arange(97.0)
    wide = x.double()
    normed = norm.weight * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    left, right = normed @ b.double(), normed @ c.double()

    first, second = torch.empty(301, 97), torch.empty(301, 97)
    products.multiply_all(x, [Factor(b, first, plus), Factor(c, second, bias)], norm=norm)
    gated = torch.empty(301, 97)
    assert products.multiply_gated(x, Factor(b, gated), c, norm)
    for found, want in (
        (first, left + plus.double()),
        (second, right + bias.double()),
        (gated, left * left.sigmoid() * right),
    ):
        assert (found.double() - want).abs().max() <= 1e-6 * want.abs().max() * inner**0.5


@needs_tiles
def test_a_gate_of_large_values_is_what_silu_is():
    x = torch.eye(256, 64)
    b, c = torch.zeros(64, 64), torch.ones(64, 64)
    b[:, 0] = torch.cat([torch.tensor([-2e4, -100.0, -88.0, 88.0, 2e4]), torch.zeros(59)])
    norm = Norm(torch.ones(64), 0.0)  # a row is a unit vector: its root mean square is 1/8
    gated = torch.empty(256, 64)
    assert products.multiply_gated(x[:, :].contiguous(), Factor(b, gated), c, norm)
    left = 8 * b[:5, 0]
    torch.testing.assert_close(gated[:5, 0], 8 * torch.nn.functional.silu(left))


@needs_tiles
def test_a_long_inner_dimension_is_not_gated():
    x, b = torch.zeros(256, _C.GATE_INNER + 1), torch.zeros(_C.GATE_INNER + 1, 64)
    norm = Norm(torch.ones(_C.GATE_INNER + 1), 1e-5)
    assert not products.multiply_gated(x, Factor(b, torch.empty(256, 64)), b, norm)


def test_a_frozen_layers_bias_has_its_gradient():
    x, weight = torch.randn(300, 64), torch.randn(70, 64)
    bias = torch.zeros(70, requires_grad=True)
    products.linear(x, weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((70,), 300.0))


@pytest.mark.parametrize(
    ("inner", "bias"),
    [(50, None), (64, torch.zeros(69)), (64, torch.zeros(70).double())],
    ids=["inner", "columns", "dtype"],
)
def test_what_does_not_agree_is_refused_as_by_torch(inner, bias):
    x, weight = torch.randn(300, inner), torch.randn(70, 64)
    with pytest.raises(RuntimeError) as expected:
        torch.nn.functional.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as found:
        products.linear(x, weight, bias)
    assert str(found.value) == str(expected.value)


def test_a_product_of_sizes_that_do_not_agree_is_refused():
    with pytest.raises(RuntimeError):
        products.multiply(torch.randn(300, 50), torch.randn(64, 70), torch.empty(300, 70))


def test_what_is_not_served_runs_in_torch():
    a, b = torch.randn(300, 64), torch.randn(64, 70)
    few = torch.randn(3, 64)
    assert products.serves(few, b) == "the product is too small to gain"
    assert "float64" in products.serves(a.double(), b)
    assert "stride of 1" in products.serves(torch.randn(300, 64, 2)[..., 0], b)
    with backend("reference"):
        assert products.serves(a, b) == "backend 'reference' is forced"
        out = torch.full((300, 70), float("nan"))
        products.multiply(a, b, out)
        assert torch.equal(out, a @ b)
        products.multiply(a, b, out, add=True)
        torch.testing.assert_close(out, 2 * (a @ b))
        assert torch.equal(products.linear(a, b.t()), torch.nn.functional.linear(a, b.t()))


def test_a_slice_of_a_batch_does_not_copy_a_frozen_weight():
    x, weight = torch.randn(16, 40, 8).bfloat16(), torch.randn(4096, 8).bfloat16()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as run:
        found = products.linear(x[:, -1:], weight)
    expected = x[:, -1:].double() @ weight.double().t()
    torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=1e-2)
    most = max(event.self_cpu_memory_usage for event in run.events())
    assert most <= found.nbytes + x.nbytes  # torch's own linear takes 16 weights


@needs_tiles
def test_the_kernel_refuses_what_it_would_misread():
    x = torch.zeros(64, 64)
    whole = (x.data_ptr(), 64, 1, 0)
    factor = (whole, 64, x.data_ptr(), 64, 0, 0)
    rest = (64, 64, False, False, 0, 0.0)
    with pytest.raises(ValueError, match="stride of 1"):
        _C.multiply((x.data_ptr(), 64, 2, 0), [factor], *rest, 3, 1)
    with pytest.raises(ValueError, match="1, 2 or 3 factors"):
        _C.multiply(whole, [], *rest, 3, 1)
    with pytest.raises(ValueError, match="parts must be 1, 2 or 3"):
        _C.multiply(whole, [factor], *rest, 4, 1)
    with pytest.raises(ValueError, match="two factors of one shape"):
        _C.multiply(whole, [factor], 64, 64, False, True, 0, 0.0, 3, 1)
