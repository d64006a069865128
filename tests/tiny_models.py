"""Tiny random transformers models and a character tokenizer, made on the spot: no downloads."""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
CHARACTERS = "0123456789+-*/=;:#.,?! abcdefghijklmnopqrstuvwxyz\n"

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = ["sliding_attention", "full_attention"]

_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES, head_dim=8, sliding_window=5, layer_types=_LAYERS, attn_logit_softcapping=0.5
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=_LAYERS),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
TINY_MODELS = tuple(_CONFIGS)
_CONFIGS["diffllama"] = lambda: DiffLlamaConfig(**SIZES)  # attends twice a layer


def tiny_config(name: str, **overrides: object) -> PreTrainedConfig:
    """Return the configuration of a tiny model, with some of its fields set otherwise."""
    config = _CONFIGS[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    return config


def tiny_model(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **overrides: object,
) -> PreTrainedModel:
    """Return a causal language model of random weights, in training mode.

    The weights are spread widely, so that attention is far from uniform and a wrong mask shows.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(name, **overrides), attn_implementation=attn_implementation
        )
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    return model.to(dtype).train()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per character of CHARACTERS, <pad>, <bos>, <eos> first."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
