"""Tiny models of random weights as folders, traces for them, and what plain transformers says."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaConfig, PhiConfig

from airl_fast.packing import Source, Trace
from tests.tiny_models import SIZES, VOCAB, tiny_config, tiny_tokenizer

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: tiny_config("qwen2"),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: tiny_config("gemma2", final_logit_softcapping=3.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.4),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi": lambda: PhiConfig(**SIZES, partial_rotary_factor=0.5),
}


def write_model(folder: Path, name: str = "llama", seed: int = 0) -> Path:
    """A tiny model of random weights with its tokenizer, as a folder of safetensors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_traces() -> list[Trace]:
    """Two prompts; the first is shared by three completions. Spans of several lengths."""
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist())

    first, second = draw(5), draw(3)
    return [
        Trace(prompt=first, completion=draw(6), span_lengths=(2, 1, 3), group=0),
        Trace(prompt=first, completion=draw(4), span_lengths=(4,), group=0, source=Source.EXPERT),
        Trace(prompt=second, completion=draw(3), span_lengths=(1, 1, 1), group=1),
        Trace(prompt=first, completion=draw(1), span_lengths=(1,), group=0),
    ]


TRACES = make_traces()


def plain(model, trace):
    """Logits that predict each action, and the hidden state at each action, run alone."""
    model.eval()
    ids = torch.tensor([[*trace.prompt, *trace.completion]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
    start = len(trace.prompt)
    return out.logits[0, start - 1 : -1], out.hidden_states[-1][0, start:]


def plain_logp(model, trace, temperature=1.0):
    logits = plain(model, trace)[0].double() / temperature
    return logits.log_softmax(-1)[range(len(trace.completion)), list(trace.completion)]


def perturb_parameters(parameters, seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += std * torch.randn(parameter.shape, generator=generator)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(found, expected, atol=1e-4):
    expected = torch.as_tensor(expected).to(found.dtype)
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


HEADS = {
    "lm": {"head": "lm", "kappa": 0.8, "offset": 0.2},
    "lm-mean": {"head": "lm", "span_logp": "mean"},
    "score": {"head": "score"},
    "shaped": {"head": "score", "shaping_gamma": 0.9},
}
