"""Packed attention on a CPU against softmax attention in float64, on every vector path."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

import airl_fast
from airl_fast.attention import packed_attention
from airl_fast.layout import ranges_of
from airl_fast.ops import _packed_attention as packed
from airl_fast.packing import Trace, pack
from tests import oracle

pytestmark = pytest.mark.usefixtures("path")
LENGTHS = 70, 1, 30, 200, 100, 700
CONTINUES = -1, 0, 0, -1, 3, -1
SIZES = [(4, 4, 24, 24), (6, 2, 7, 5), (3, 1, 64, 64), (2, 1, 130, 80)]  # H, Hk, E, Ev


def ranges(lengths, continues):
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    return torch.tensor(
        [
            [first[i], n, first[p] if p >= 0 else 0, lengths[p] if p >= 0 else 0, first[i]]
            for i, (n, p) in enumerate(zip(lengths, continues, strict=True))
        ]
    )


def numbers(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens, heads, key_heads, size, value_size, scale=1.0):
    return (
        numbers(tokens, heads, size, seed=0, scale=scale),
        numbers(tokens, key_heads, size, seed=1),
        numbers(tokens, key_heads, value_size, seed=2),
    )


def results(attend, tensors, upstream):
    """What ``attend`` gives, and its gradients, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    grads = torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)
    return [x.double() for x in (out.detach(), *grads)]


def plain(table, scale, window):
    """The formula by torch's own operations in float32."""

    def attend(q, k, v):
        outs = []
        for first, n, first_shared, shared, own in table.tolist():
            seen = [*range(first_shared, first_shared + shared), *range(own, own + n)]
            one = [x.transpose(0, 1)[None] for x in (q[first : first + n], k[seen], v[seen])]
            place, key = torch.arange(shared, shared + n)[:, None], torch.arange(shared + n)
            visible = (key <= place) & (key > place - (window or 1 << 62))
            out = torch.nn.functional.scaled_dot_product_attention(
                *one, attn_mask=visible, scale=scale, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


@pytest.mark.parametrize("window", [None, 5, 70, 600])
@pytest.mark.parametrize(("heads", "key_heads", "size", "value_size"), SIZES)
def test_each_segment_attends_to_itself_and_to_what_it_continues(
    heads, key_heads, size, value_size, window
):
    table = ranges(LENGTHS, CONTINUES)
    tensors = inputs(sum(LENGTHS), heads, key_heads, size, value_size)
    upstream = numbers(sum(LENGTHS), heads, value_size, seed=3)
    assert_exact(table, tensors, upstream, size**-0.5, window)


def assert_exact(table, tensors, upstream, scale, window):
    """Errors are at most twice those of torch's own attention in float32, segment by segment."""
    exact = results(
        lambda q, k, v: oracle.attention(table, q, k, v, scale, window),
        [x.double() for x in tensors],
        upstream,
    )
    ours = results(lambda *x: packed.attend(table, *x, scale, window), tensors, upstream)
    theirs = results(plain(table, scale, window), tensors, upstream)
    for one, other, right in zip(ours, theirs, exact, strict=True):
        error, allowed = (one - right).abs().max(), (other - right).abs().max()
        assert error <= 2 * allowed + 1e-7 * right.abs().max()


@pytest.mark.parametrize(("heads", "key_heads", "size", "value_size"), SIZES)
def test_a_window_of_one_is_the_value(heads, key_heads, size, value_size):
    table = ranges(LENGTHS, CONTINUES)
    tensors = inputs(sum(LENGTHS), heads, key_heads, size, value_size)
    upstream = numbers(sum(LENGTHS), heads, value_size, seed=3)
    out, d_q, d_k, d_v = results(
        lambda *x: packed.attend(table, *x, size**-0.5, 1), tensors, upstream
    )
    group = heads // key_heads
    assert torch.equal(out, tensors[2].repeat_interleave(group, 1).double())
    assert max(d_q.abs().max(), d_k.abs().max()) < 1e-5
    right = upstream.double().unflatten(1, (key_heads, -1)).sum(2)
    torch.testing.assert_close(d_v, right, rtol=0, atol=2e-6)


def test_long_segments_are_cut_in_pieces_that_add_up():
    table = ranges((2100, 40, 2200), (-1, 0, -1))
    tensors = inputs(4340, 2, 1, 16, 16)
    upstream = numbers(4340, 2, 16, seed=3)
    for window in (None, 900):
        assert_exact(table, tensors, upstream, 0.25, window)


def test_any_strides_will_do():
    table = ranges((5, 60), (-1, -1))
    tensors = inputs(65, 4, 2, 12, 12)
    upstream = numbers(65, 4, 12, seed=3)
    expected = results(lambda *x: packed.attend(table, *x, 0.3, None), tensors, upstream)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    by_number = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for others in (by_head, by_number):
        leaves = [x.requires_grad_() for x in others]
        out = packed.attend(table, *leaves, 0.3, None)
        grads = torch.autograd.grad((out.transpose(0, 1) * upstream.transpose(0, 1)).sum(), leaves)
        for one, other in zip((out, *grads), expected, strict=True):
            assert torch.equal(one.double(), other)


def test_a_segment_has_the_same_bits_whatever_is_beside_it_and_on_any_number_of_threads():
    table = ranges(LENGTHS, CONTINUES)
    tensors = inputs(sum(LENGTHS), 4, 2, 24, 24)
    upstream = numbers(sum(LENGTHS), 4, 24, seed=3)
    together = results(lambda *x: packed.attend(table, *x, 0.2, None), tensors, upstream)
    torch.set_num_threads(3)
    try:
        again = results(lambda *x: packed.attend(table, *x, 0.2, None), tensors, upstream)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    rows = slice(71 + 30, 71 + 30 + 300)  # the fourth, and the fifth that continues it
    alone = results(
        lambda *x: packed.attend(ranges((200, 100), (-1, 0)), *x, 0.2, None),
        [x[rows] for x in tensors],
        upstream[rows],
    )
    assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("window", [None, 33])
def test_a_shared_prompt_gives_the_bits_of_one_laid_before(window):
    shared = ranges((90, 70, 50), (-1, 0, 0))
    q, k, v = inputs(210, 4, 2, 24, 24)
    out = packed.attend(shared, q, k, v, 0.2, window)
    for rows in (slice(90, 160), slice(160, 210)):
        whole = [torch.cat([x[:90], x[rows]]) for x in (q, k, v)]
        inline = packed.attend(ranges((len(whole[0]),), (-1,)), *whole, 0.2, window)
        assert torch.equal(inline[:90], out[:90])
        assert torch.equal(inline[90:], out[rows])


def test_keys_may_lie_elsewhere_than_queries():
    q, k, v = inputs(150, 4, 2, 24, 24)
    whole = packed.attend(ranges((150,), (-1,)), q, k, v, 0.2, None)
    after = packed.attend(torch.tensor([[0, 50, 0, 100, 100]]), q[100:], k, v, 0.2, None)
    assert torch.equal(after, whole[100:])


def test_scores_of_any_size_are_no_overflow():
    table = ranges((40, 90), (-1, 0))
    tensors = inputs(130, 2, 1, 16, 16, scale=1e4)
    upstream = numbers(130, 2, 16, seed=3)
    assert_exact(table, tensors, upstream, 1.0, None)


def test_a_number_that_is_none_stays_in_its_segment():
    table = ranges((40, 30, 90), (-1, 0, 0))
    q, k, v = inputs(160, 2, 1, 16, 16)
    k[45] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = packed.attend(table, *leaves, 0.25, None)
    assert out[45:70].isnan().all()
    assert out[:40].isfinite().all()
    assert out[70:].isfinite().all()
    q_grad, k_grad, v_grad = torch.autograd.grad(out.sum(), leaves)
    for grad in (q_grad, k_grad, v_grad):
        assert grad[70:].isfinite().all()


def test_every_number_of_the_results_is_written(monkeypatch):
    def poisoned(*shape):
        return torch.full(*shape if len(shape) == 1 else (shape,), torch.nan)

    monkeypatch.setattr(packed, "floats", poisoned)
    leaves = [x.requires_grad_() for x in inputs(130, 6, 2, 7, 5)]
    out = packed.attend(ranges((40, 90), (-1, 0)), *leaves, 0.3, 20)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_what_needs_no_gradient_gets_none():
    q, k, v = inputs(30, 2, 1, 16, 16)
    v.requires_grad_()
    packed.attend(ranges((30,), (-1,)), q, k, v, 0.25, None).sum().backward()
    assert q.grad is None
    assert k.grad is None
    assert v.grad.shape == v.shape


@pytest.mark.parametrize("frozen", [None, 0, 2])
def test_gradients_of_gradients(frozen):
    table = ranges((12, 9, 30), (-1, 0, -1))

    def penalty(attend, tensors):
        leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
        out = attend(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    tensors = inputs(51, 4, 2, 8, 6)
    ours = penalty(lambda *x: packed.attend(table, *x, 0.3, 7), tensors)
    exact = penalty(
        lambda q, k, v: oracle.attention(table, q, k, v, 0.3, 7), [x.double() for x in tensors]
    )
    for one, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max())


def test_keys_that_are_their_own_values_get_both_gradients():
    table = ranges((12, 30), (-1, 0))
    q, k, _ = inputs(42, 4, 2, 8, 8)
    found = []
    for create_graph in (False, True):
        both = k.clone().requires_grad_()
        out = packed.attend(table, q, both, both, 0.3, None)
        found += torch.autograd.grad(out.square().sum(), both, create_graph=create_graph)
    exact = k.double().requires_grad_()
    out = oracle.attention(table, q, exact, exact, 0.3, None)
    right = torch.autograd.grad(out.square().sum(), exact)[0]
    for grad in found:
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-5)


def test_float32_whatever_the_default_is():
    tensors = inputs(30, 2, 1, 16, 16)
    table = ranges((30,), (-1,))
    expected = packed.attend(table, *tensors, 0.25, None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(packed.attend(table, *tensors, 0.25, None), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ranges_of_a_batch():
    traces = [Trace(prompt=(1, 2, 3), completion=(4,) * n, span_lengths=(n,)) for n in (2, 1)]
    batch = pack([*traces, Trace(prompt=(5,), completion=(6, 7), span_lengths=(2,))])
    assert ranges_of(batch).tolist() == [
        [0, 3, 6, 0, 0], [3, 2, 0, 3, 3], [5, 1, 0, 3, 5], [6, 3, 6, 0, 6]
    ]  # fmt: skip
    assert ranges_of(batch) is ranges_of(batch)


def through(q, k, v, batch, forced=None, **options):
    """packed_attention over [T, H, E] heads."""
    heads = (x[None].transpose(1, 2) for x in (q, k, v))
    with airl_fast.backend(forced) if forced else nullcontext():
        return packed_attention(torch.nn.Identity(), *heads, None, packed_batch=batch, **options)[0]


def small_batch():
    long = Trace(prompt=(1, 2, 3), completion=(4,) * 6, span_lengths=(6,))
    return pack([long, replace(long, completion=(5,) * 4, span_lengths=(4,))])


def test_heads_of_another_shape_are_torchs_business():
    batch = small_batch()
    q, k, v = inputs(batch.num_tokens, 4, 2, 8, 8)
    served = partial(packed.serves, scale=1.0, window=None, queries=13, keys=13)
    four = [x[None].transpose(1, 2) for x in (q, k, v)]
    assert served(*four)
    fewer, other, odd = q[:5], v[:, :1], q[:, :3]
    for heads in ((fewer, k, v), (q, k[:5], v[:5]), (q, k, other), (odd, k, v), (q[..., :4], k, v)):
        assert not served(*(x[None].transpose(1, 2) for x in heads))
    assert not served(*(x.transpose(1, 2)[None, 0] for x in (q, k, v)))
    assert not served(*four, window=0)
    assert not served(*four, scale=0.0)
    assert not served(*four, scale=torch.tensor(1.0))
    for heads in ((fewer, k, v), (odd, k, v)):
        with pytest.raises((RuntimeError, IndexError)):
            through(*heads, batch)
    assert torch.equal(through(q, k, other, batch), through(q, k, other, batch, "reference"))


def test_scores_that_are_all_hidden_for_long_leave_the_later_ones():
    table = ranges((600,), (-1,))
    q, k, v = inputs(600, 1, 1, 16, 16)
    k[:512], q = -torch.finfo(torch.float32).max, q.abs()
    out = packed.attend(table, q, k, v, 0.25, None)
    right = oracle.attention(table, q, k.clamp(min=-1e4), v, 0.25, None)
    torch.testing.assert_close(out[513:].double(), right[513:], rtol=1e-5, atol=1e-5)


def test_a_tensor_that_stands_for_its_negative():
    batch = small_batch()
    q, k, v = (torch._neg_view(x) for x in inputs(batch.num_tokens, 4, 2, 8, 8))
    expected = through(q.clone(), k.clone(), v.clone(), batch)
    assert torch.equal(through(q, k, v, batch), expected)


def test_tensors_saved_elsewhere_may_come_back_with_other_strides():
    tensors = inputs(51, 4, 2, 8, 6)
    table, upstream = ranges((12, 9, 30), (-1, 0, -1)), numbers(51, 4, 6, seed=3)
    expected = results(lambda *x: packed.attend(table, *x, 0.3, None), tensors, upstream)
    turned = lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(), lambda x: turned(x) if x.is_floating_point() else x
    )
    with hooks:
        found = results(lambda *x: packed.attend(table, *x, 0.3, None), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's attention under vmap
def test_many_gradients_at_once_and_many_inputs_at_once():
    batch = small_batch()
    tensors = [x.requires_grad_() for x in inputs(batch.num_tokens, 4, 2, 8, 8)]
    many = numbers(3, 1, batch.num_tokens, 4, 8, seed=4)
    found = torch.autograd.grad(
        through(*tensors, batch), tensors, many, is_grads_batched=True, retain_graph=True
    )
    for i in range(3):
        one = torch.autograd.grad(through(*tensors, batch), tensors, many[i])
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)
    stacked = [torch.stack([x.detach(), 2 * x.detach()]) for x in tensors]
    both = torch.func.vmap(lambda *x: through(*x, batch))(*stacked)
    for i in range(2):
        torch.testing.assert_close(both[i], through(*(x[i] for x in stacked), batch))


def test_it_serves_what_it_can():
    x = torch.zeros(1, 2, 6, 16)
    served = partial(packed.serves, scale=0.25, window=None, queries=6, keys=6)
    assert served(x, x, x)
    assert not served(*[x.bfloat16()] * 3)
    assert not served(*[x.double()] * 3)
    with airl_fast.backend("reference"):
        assert not served(x, x, x)
    batch = pack([Trace(prompt=(1, 2, 3), completion=(4, 5, 6), span_lengths=(3,))])
    with airl_fast.backend("reference"):
        expected, _ = packed_attention(torch.nn.Identity(), x, x, x, None, packed_batch=batch)
    torch.testing.assert_close(
        packed_attention(torch.nn.Identity(), x, x, x, None, packed_batch=batch)[0], expected
    )
