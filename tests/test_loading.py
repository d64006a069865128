"""GGUF files: read, dequantised, adapted, saved, read back, trained. And what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from airl_fast.building import load_measured, load_policy
from airl_fast.config import load_config
from airl_fast.discriminator import Discriminator
from airl_fast.loading import add_adapter, load_language_model, resolve
from airl_fast.metadata import read_metadata
from airl_fast.packing import Trace, pack
from airl_fast.policy import Policy
from airl_fast.trainer import Trainer
from tests.tiny_models import CHARACTERS, VOCAB, tiny_model

gguf = pytest.importorskip("gguf")

HEADS, KEY_HEADS, LAYERS = 4, 2, 2
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OF_A_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection in the order in which GGUF keeps them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny Llama, 8-bit where a row is a multiple of 32 long; returns what it holds."""
    model = tiny_model("llama")
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _TOP.items()}
    for i in range(LAYERS):
        for ours, theirs in _OF_A_LAYER.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    characters = [c.replace(" ", "Ġ").replace("\n", "Ċ") for c in CHARACTERS]
    tokens = ["<pad>", "<bos>", "<eos>", *characters, "ab", "cd"]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])  # transformers 5.17 misreads a list of one
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    held = {}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else 0
        stored = np.ascontiguousarray(interleaved(value, heads) if heads else value)
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(names[name], gguf.quants.quantize(stored, kind), raw_dtype=kind)
            # A row is quantised on its own, so that the order of the rows does not matter.
            value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        else:
            writer.add_tensor(names[name], stored)
        held[name] = torch.tensor(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return folder, write_gguf(folder)


def batch_of(policy):
    prompt, completion = (policy.tokenizer(text).input_ids for text in ("12+3=", "12+3=15;#15."))
    spans = (len(completion) - 2, 2)
    return pack([Trace(prompt=tuple(prompt), completion=tuple(completion), span_lengths=spans)])


def moved(parameters):
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(i)
            )


def test_a_gguf_file_is_dequantised_exactly(tiny_gguf):
    folder, held = tiny_gguf
    policy = Policy.from_pretrained(folder, gguf_file="tiny.gguf")
    found = policy.model.state_dict()
    assert set(found) == set(held)
    for name, value in held.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    assert set(policy.trainable()) == set(dict(policy.model.named_parameters()))
    assert policy.tokenizer.decode(policy.tokenizer("a b\n1").input_ids) == "a b\n1"
    assert (policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id) == (2, 0)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_gguf_model_trains_saves_and_comes_back(tiny_gguf, tmp_path, rank):
    folder, _ = tiny_gguf
    policy = Policy.from_pretrained(folder, gguf_file="tiny.gguf", lora_rank=rank)
    moved(policy.trainable())
    batch = batch_of(policy)
    policy.logprob(policy.hidden(batch), batch)[0].sum().backward()
    assert all(p.grad is not None for p in policy.trainable().values())
    policy.save(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
    assert torch.equal(Policy.from_pretrained(tmp_path).hidden(batch), policy.hidden(batch))


def test_a_gguf_reward_comes_back(tiny_gguf, tmp_path):
    folder, _ = tiny_gguf
    policy = Policy.from_pretrained(folder, gguf_file="tiny.gguf", lora_rank=2)
    discriminator = Discriminator.create(policy, trunk="shared", lora_rank=2)
    moved(discriminator.trainable())
    discriminator.save(tmp_path)
    batch = batch_of(policy)
    assert torch.equal(Discriminator.from_pretrained(tmp_path).f(batch), discriminator.f(batch))


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_on_a_gguf_file(tiny_gguf, tmp_path, shared):
    folder, _ = tiny_gguf
    overrides = [
        f"run.output_dir={tmp_path}",
        f"policy.model={folder}",
        "policy.gguf_file=tiny.gguf",
        "run.steps=1",
        "run.eval_every=0",
        "algorithm.sft_warmup=1",
        "discriminator.warmup_updates=1",
        "discriminator.perturbed_per_update=1",
        "sampling.prompts_per_step=2",
        "sampling.group_size=2",
        "sampling.max_new_tokens=6",
        "task.demonstrations=4",
        "task.unlabelled=0",
        "task.validation=0",
        "task.test=0",
    ]
    if shared:
        overrides += [
            "policy.lora_rank=2",
            "discriminator.lora_rank=2",
            "discriminator.trunk=shared",
        ]
    trainer = Trainer(load_config("arithmetic", overrides))
    metrics = trainer.train()
    assert [line["phase"] for line in metrics] == ["sft", "discriminator", "policy"]
    back = Policy.from_pretrained(tmp_path / "policy")
    batch = batch_of(back)
    assert torch.equal(back.hidden(batch), trainer.policy.hidden(batch))
    reward = Discriminator.from_pretrained(tmp_path / "reward")
    assert torch.equal(reward.f(batch), trainer.discriminator.f(batch))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_policy_is_measured_as_its_run_loads_it(tiny_gguf, tmp_path, rank):
    folder, held = tiny_gguf
    dtype = "bfloat16" if rank else "float32"
    options = [f"policy.dtype={dtype}", f"policy.lora_rank={rank}", "algorithm.sft_warmup=0"]
    model = [f"policy.model={folder}", "policy.gguf_file=tiny.gguf", "run.device=cpu"]
    config = load_config("arithmetic", [*options, *model])
    base = load_measured(folder, config)
    expected = getattr(torch, dtype)
    assert torch.equal(base.head.weight, held["lm_head.weight"].to(expected))
    policy = load_policy(config)
    moved(policy.trainable())
    policy.save(tmp_path)
    found = load_measured(tmp_path, config)
    assert found.head.weight.dtype == expected
    batch = batch_of(policy)
    assert torch.equal(found.hidden(batch), policy.hidden(batch))


def test_the_built_in_model_is_found_by_name():
    assert (Path(resolve("arithmetic-base")) / "model.safetensors").is_file()
    assert resolve("some/model") == "some/model"


def test_a_folder_of_pickles_is_not_loaded(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    from tests.tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pickles .* expected safetensors"):
        Policy.from_pretrained(tmp_path)


def test_a_missing_description_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no airl_fast\.json: expected a policy"):
        read_metadata(tmp_path, "policy")


def test_adapters_go_over_adapters_only(tiny_gguf):
    folder, _ = tiny_gguf
    from airl_fast.language_model import Origin

    body = load_language_model(Origin(model=str(folder), gguf_file="tiny.gguf"))
    with pytest.raises(ValueError, match="shared backbone needs LoRA"):
        add_adapter(body, "discriminator", 2, 4)
