import functools
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    Qwen2MoeConfig,
    T5Config,
)

from airl_fast import attention, layout
from airl_fast.attention import (
    enable_packed_attention,
    packed_attention,
    packed_forward,
    standard_attention,
)
from airl_fast.layout import layout_of
from airl_fast.packing import Trace, pack

from .tiny_models import SIZES, TINY_MODELS, VOCAB, tiny_model

PROMPTS = (4, 1, 9, 6)
COMPLETIONS = ((1, 7, 12), (3,), (1, 1, 20, 2), (5, 8))  # per prompt; sliding windows are 5


@functools.cache
def ragged_traces() -> list[Trace]:
    """Completions of 1 to 20 tokens, prompts of 1 to 9; two prompts' traces are interleaved."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(3, VOCAB, (n,), generator=rng).tolist())  # noqa: E731
    made = []
    for length, completions in zip(PROMPTS, COMPLETIONS, strict=True):
        prompt = draw(length)
        made += [Trace(prompt=prompt, completion=draw(n), span_lengths=(n,)) for n in completions]
    return made[::2] + made[1::2]


def run_alone(trunk: nn.Module, traces: list[Trace]) -> torch.Tensor:
    """Hidden states of every completion, one unpadded sequence at a time, [N, D]."""
    hidden = []
    for t in traces:
        ids = torch.tensor([t.prompt + t.completion])
        out = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
        hidden.append(out[len(t.prompt) :])
    return torch.cat(hidden)


def gradients(model: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter gradients of a loss that weighs every hidden value differently."""
    weight = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    model.zero_grad()
    (hidden * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            actual[name], gradient, rtol=0, atol=2e-5 * max(scale, 1), msg=lambda m, n=name: n + m
        )


# The kernel; and torch's, with one padded bucket, and as many as lengths.
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("forced", "free_scores"), [(None, 1 << 30), ("reference", 1 << 30), ("reference", 0)]
)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_packed_equals_each_sequence_alone(name, share, forced, free_scores, monkeypatch):
    monkeypatch.setattr(layout, "_FREE_SCORES", free_scores)
    if forced:
        monkeypatch.setenv("AIRL_FAST_BACKEND", forced)
    model = tiny_model(name)
    trunk, traces = model.get_decoder(), ragged_traces()
    with standard_attention(model):
        alone = run_alone(trunk, traces)
        expected = gradients(model, alone)
    enable_packed_attention(model)
    batch = pack(traces, share_prompts=share)
    assert len(layout_of(batch).buckets) == (2 if share else 1) or not free_scores
    hidden = packed_forward(trunk, batch)
    assert hidden.shape == (batch.num_tokens, 32)
    assert hidden.dtype == torch.float32
    packed = hidden[batch.action_index]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert_gradients_close(gradients(model, packed), expected)


@pytest.mark.parametrize("forced", ["", "reference"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_sliding_windows_matter_here(name, share, forced, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_BACKEND", forced)
    model = tiny_model(name)
    enable_packed_attention(model)
    batch = pack(ragged_traces(), share_prompts=share)
    narrow = packed_forward(model.get_decoder(), batch)
    wide = packed_forward(_with_window(model, 64).get_decoder(), batch)
    assert (narrow - wide).abs().max() > 1e-2


def _with_window(model, window):
    model.config.sliding_window = window
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = window
    return model


@pytest.mark.parametrize("forced", ["", "reference"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_nothing_crosses_sequences(name, share, forced, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_BACKEND", forced)
    model = tiny_model(name).eval()
    enable_packed_attention(model)
    traces = ragged_traces()
    changed = next(i for i, t in enumerate(traces) if len(t.completion) == 12)
    other = Trace(
        prompt=traces[changed].prompt,
        completion=tuple(VOCAB - 1 - i for i in traces[changed].completion),
        span_lengths=traces[changed].span_lengths,
    )
    hidden = []
    for batch_traces in (traces, [*traces[:changed], other, *traces[changed + 1 :]]):
        batch = pack(batch_traces, share_prompts=share)
        hidden.append(packed_forward(model.get_decoder(), batch)[batch.action_index].detach())
    a, b = batch.cu_actions[changed], batch.cu_actions[changed + 1]
    same = torch.ones(batch.num_actions, dtype=torch.bool)
    same[a:b] = False
    assert torch.equal(hidden[0][same], hidden[1][same])
    assert (hidden[0][~same] != hidden[1][~same]).any(-1).all()


@pytest.mark.parametrize("forced", ["", "reference"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_not_a_number_stays_in_its_sequence(name, forced, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_BACKEND", forced)
    model = tiny_model(name)
    enable_packed_attention(model)
    traces = ragged_traces()
    batch = pack(traces)
    embeds = torch.randn(batch.num_tokens, 32, generator=torch.Generator().manual_seed(1))
    bad = batch.action_index[batch.cu_actions[0] : batch.cu_actions[1]]
    embeds[bad] = torch.nan
    embeds.requires_grad_()
    hidden = packed_forward(model.get_decoder(), batch, inputs_embeds=embeds)
    assert hidden[bad].isnan().all()
    keep = torch.ones(batch.num_tokens, dtype=torch.bool)
    keep[bad] = False
    assert hidden[keep].isfinite().all()


def test_gradient_checkpointing():
    model = tiny_model("gemma2")
    enable_packed_attention(model)
    batch = pack(ragged_traces())
    expected = gradients(model, packed_forward(model.get_decoder(), batch))
    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        assert_gradients_close(
            gradients(model, packed_forward(model.get_decoder(), batch)), expected
        )


def test_lora_model():
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    enable_packed_attention(model)
    trunk, traces = model.get_base_model().get_decoder(), ragged_traces()
    batch = pack(traces)
    packed = packed_forward(trunk, batch)[batch.action_index]
    actual = gradients(model, packed)
    with standard_attention(model):
        alone = run_alone(trunk, traces)
        expected = gradients(model, alone)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert len(expected) == 8
    assert_gradients_close(actual, expected)


def test_inputs_embeds_replace_the_ids():
    model = tiny_model("llama")
    enable_packed_attention(model)
    batch = pack(ragged_traces())
    embeds = model.get_input_embeddings()(batch.input_ids)
    assert torch.equal(
        packed_forward(model.get_decoder(), batch, inputs_embeds=embeds),
        packed_forward(model.get_decoder(), batch),
    )
    with pytest.raises(ValueError, match=r"inputs_embeds of shape \[.*one row per token"):
        packed_forward(model.get_decoder(), batch, inputs_embeds=embeds[None])


def test_bfloat16_is_as_close_as_transformers_own():
    model = tiny_model("llama", dtype=torch.bfloat16)
    exact = tiny_model("llama", dtype=torch.float64)
    traces = ragged_traces()
    truth = run_alone(exact.get_decoder(), traces)
    theirs = run_alone(model.get_decoder(), traces)
    enable_packed_attention(model)
    batch = pack(traces)
    ours = packed_forward(model.get_decoder(), batch)[batch.action_index]
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


MOE = {**SIZES, "head_dim": 8, "sliding_window": 5}


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**MOE, num_local_experts=2, num_experts_per_tok=1),  # attention sinks
        Qwen2MoeConfig(  # keeps its window from the attention function
            **MOE,
            use_sliding_window=True,
            layer_types=["sliding_attention", "full_attention"],
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_models_whose_attention_has_more_to_it(config):
    torch.manual_seed(0)
    trunk, traces = AutoModel.from_config(config), ragged_traces()
    for parameter in trunk.parameters():
        parameter.data.normal_(std=0.3)
    with standard_attention(trunk):
        alone = run_alone(trunk, traces)
        expected = gradients(trunk, alone)
    enable_packed_attention(trunk)
    batch = pack(traces)
    packed = packed_forward(trunk, batch)[batch.action_index]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert_gradients_close(gradients(trunk, packed), expected)


def test_generation_goes_on_as_before():
    model = tiny_model("gemma2", attn_implementation="eager").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    sample = functools.partial(
        model.generate, ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    expected = sample()
    enable_packed_attention(model)
    with standard_attention(model):
        assert model.config._attn_implementation == "eager"  # sdpa would leave out the soft cap
        assert torch.equal(sample(), expected)
    assert model.config._attn_implementation == attention.NAME
    with pytest.raises(ValueError, match="standard_attention"):
        sample()
    with pytest.raises(RuntimeError, match="stop"), standard_attention(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == attention.NAME


def test_layout_is_made_once_and_goes_with_the_batch():
    batch = pack(ragged_traces())
    made = weakref.ref(layout_of(batch))
    assert layout_of(batch) is made()
    del batch
    gc.collect()
    assert made() is None


@pytest.mark.parametrize("share", [True, False])
def test_padding_inside_buckets_is_bounded(share):
    rng = torch.Generator().manual_seed(0)
    lengths = (torch.randn(400, generator=rng) * 0.5 + 4.6).exp().long().clamp(min=1).tolist()
    traces = [
        Trace(prompt=(i // 4,) * lengths[i // 4], completion=(1,) * n, span_lengths=(n,))
        for i, n in enumerate(lengths)
    ]
    batch = pack(traces, share_prompts=share)
    made = layout_of(batch)
    own = batch.cu_segments.diff()
    keys = own + torch.where(batch.prefix >= 0, own[batch.prefix], 0)
    padded = sum(n * q * k for n, q, k in (b.shape for b in made.buckets))
    assert padded <= 1.2 * (own * keys).sum()
    assert len(made.buckets) < batch.prefix.numel() / 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
            "T5Model.*encoder-decoder",
        ),
        (
            BertConfig(
                vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=8,
            ),
            "BertModel.*not causal",
        ),
        (
            MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2),
            "MambaModel.*(state|layers of type)",
        ),
        (
            Lfm2Config(
                vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, intermediate_size=8, layer_types=["conv", "full_attention"],
            ),
            "Lfm2Model.*layers of type conv",
        ),
        (
            Gemma2Config(
                vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
                num_key_value_heads=2, intermediate_size=8, use_bidirectional_attention=True,
            ),
            "Gemma2Model.*not causal",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_models_that_mix_tokens_otherwise_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        enable_packed_attention(AutoModel.from_config(config))


def test_models_without_the_attention_interface_are_refused():
    model = tiny_model("llama")
    type(model)._supports_attention_backend, kept = False, type(model)._supports_attention_backend
    try:
        with pytest.raises(ValueError, match="does not use transformers' attention interface"):
            enable_packed_attention(model)
    finally:
        type(model)._supports_attention_backend = kept


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match=r"expected a transformers model.*received Linear"):
        enable_packed_attention(nn.Linear(2, 2))


def test_models_that_were_not_enabled_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"attends by 'sdpa'.*enable_packed_attention"):
        packed_forward(model.get_decoder(), pack(ragged_traces()))


def test_models_with_a_head_are_refused():
    model = tiny_model("llama")
    enable_packed_attention(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM returns no last_hidden_state"):
        packed_forward(model, pack(ragged_traces()))


def test_attention_dropout_is_refused_in_training_only():
    model = tiny_model("llama", attention_dropout=0.1)
    enable_packed_attention(model)
    batch = pack(ragged_traces())
    with pytest.raises(ValueError, match=r"attention dropout of 0.1.*set it to 0"):
        packed_forward(model.get_decoder(), batch)
    packed_forward(model.eval().get_decoder(), batch)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_batch_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope["original_max_position_embeddings"] = 16
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    trunk = AutoModel.from_config(config)
    enable_packed_attention(trunk)
    short = [t for t in ragged_traces() if t.num_tokens <= 16]
    packed_forward(trunk, pack(short))
    with pytest.raises(ValueError, match=f"29 tokens, and beyond 16 .*'{rope_type}'"):
        packed_forward(trunk, pack(ragged_traces()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias, which packed attention cannot honour"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 3}, "sliding window of 3, its mask for None"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(kwargs, message):
    batch = pack([Trace(prompt=(1,), completion=(2,), span_lengths=(1,))])
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=message):
        packed_attention(nn.Identity(), x, x, x, None, packed_batch=batch, **kwargs)


def test_a_mask_is_refused():
    batch = pack([Trace(prompt=(1,), completion=(2,), span_lengths=(1,))])
    x = torch.zeros(1, 1, 2, 4)
    mask = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 2, 2\)"):
        packed_attention(nn.Identity(), x, x, x, mask, packed_batch=batch)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_training_after_scoring_the_same_batch(name):
    model = tiny_model(name)
    enable_packed_attention(model)
    batch = pack(ragged_traces())
    with torch.inference_mode():
        scored = packed_forward(model.get_decoder(), batch)
    hidden = packed_forward(model.get_decoder(), batch)
    assert torch.equal(hidden, scored)
    assert gradients(model, hidden)
