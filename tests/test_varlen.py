"""One call of variable-length attention per layer, with the kernel's meaning written in torch.

The kernels themselves run on a GPU alone; what they are given, and what becomes of their results
and gradients, is the same here. The last test is for machines with one.
"""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from airl_fast import varlen
from airl_fast.attention import enable_packed_attention, packed_forward
from airl_fast.packing import Trace, pack
from airl_fast.varlen import varlen_layout_of

from .test_attention import assert_gradients_close, gradients, ragged_traces, run_alone
from .tiny_models import tiny_model


def by_definition(q, k, v, layout, scale, window):
    """Flash attention's varlen function: causal, aligned to the last query and key."""
    outputs = []
    cu_q, cu_k = layout.cu_queries.tolist(), layout.cu_keys.tolist()
    assert layout.longest_query == max(b - a for a, b in pairwise(cu_q))
    assert layout.longest_key == max(b - a for a, b in pairwise(cu_k))
    for s in range(len(cu_q) - 1):
        rows = [x[a:b].transpose(0, 1) for x, a, b in (
            (q, cu_q[s], cu_q[s + 1]), (k, cu_k[s], cu_k[s + 1]), (v, cu_k[s], cu_k[s + 1])
        )]  # fmt: skip
        num_q, num_k = rows[0].shape[1], rows[1].shape[1]
        query = torch.arange(num_q)[:, None] + num_k - num_q
        key = torch.arange(num_k)
        seen = key <= query
        if window[0] >= 0:
            seen &= key >= query - window[0]
        out = scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def emulated(monkeypatch):
    calls = []

    def kernel(*args):
        calls.append(args)
        return by_definition(*args)

    monkeypatch.setattr(varlen, "serves", lambda *args: None)
    monkeypatch.setattr(varlen, "flash", lambda: kernel)
    return calls


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral"])  # grouped keys; sliding windows
def test_packed_equals_each_sequence_alone(name, share, emulated):
    model, traces = tiny_model(name), ragged_traces()
    alone = run_alone(model.get_decoder(), traces)
    expected = gradients(model, alone)
    enable_packed_attention(model)
    batch = pack(traces, share_prompts=share)
    packed = packed_forward(model.get_decoder(), batch)[batch.action_index]
    assert len(emulated) == model.config.num_hidden_layers
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert_gradients_close(gradients(model, packed), expected)


def test_every_token_is_its_own_key_once_and_a_copy_for_each_continuation():
    traces = [
        Trace(prompt=(1, 2, 3), completion=(4,) * n, span_lengths=(n,)) for n in (2, 1, 5)
    ] + [Trace(prompt=(9,), completion=(7, 8), span_lengths=(2,))]
    batch = pack(traces)
    layout = varlen_layout_of(batch)
    assert layout is varlen_layout_of(batch)
    assert torch.equal(layout.keys[layout.own], torch.arange(batch.num_tokens))
    both = torch.cat([layout.own, layout.copies]).sort().values
    assert torch.equal(both, torch.arange(len(layout.keys)))
    counts = layout.cu_copies.diff()
    assert torch.equal(layout.copied.repeat_interleave(counts), layout.keys[layout.copies])
    assert len(layout.copied) == 3  # the prompt of one trace is part of its own segment
    assert varlen_layout_of(pack(traces, share_prompts=False)).keys is None


def test_what_flash_attention_cannot_take_is_said():
    q = torch.zeros(1, 2, 3, 8)
    assert "on a GPU, not on cpu" in varlen.serves(q, q, None, None)
    on_gpu = torch.zeros(1, 2, 3, 8, device="meta")
    on_gpu = _Pretend(on_gpu)
    assert "bfloat16 and float16, not float32" in varlen.serves(on_gpu, on_gpu, None, None)
    half = _Pretend(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))
    assert "soft-capped" in varlen.serves(half, half, 30.0, None)
    wide = _Pretend(torch.zeros(1, 2, 3, 512, dtype=torch.bfloat16))
    assert "at most 256" in varlen.serves(wide, wide, None, None)
    assert varlen.serves(half, half, None, None) is None


class _Pretend:
    """A tensor's dtype and shape, on a GPU that is not there."""

    def __init__(self, x):
        self.device, self.dtype, self.shape = torch.device("cuda"), x.dtype, x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_kernels_agree_with_the_buckets_on_a_gpu(name, share, monkeypatch):
    model = tiny_model(name).to("cuda", torch.bfloat16)
    enable_packed_attention(model)
    batch = pack(ragged_traces(), share_prompts=share).to("cuda")
    results = []
    for by_flash in (True, True, False):
        if not by_flash:
            monkeypatch.setattr(varlen, "serves", lambda *args: "not asked")
        hidden = packed_forward(model.get_decoder(), batch)
        results.append((hidden, gradients(model, hidden.float())))
    (first, d_first), (again, d_again), (buckets, d_buckets) = results
    assert torch.equal(first, again)
    assert all(torch.equal(d_first[k], d_again[k]) for k in d_first)
    torch.testing.assert_close(first, buckets, rtol=2e-2, atol=2e-2)
    for name, gradient in d_buckets.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(d_first[name], gradient, rtol=0, atol=4e-2 * max(scale, 1))
