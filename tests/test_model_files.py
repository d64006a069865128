"""Model folders: only safetensors, only plain LoRA, no code that nobody asked for."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from airl_fast import Discriminator, Policy, RewardScorer
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.metadata import read_metadata
from airl_fast.model_files import TRUST_VARIABLE, check_model_folder, no_pickle
from airl_fast.reward_folder import read_trained
from tests.tiny_models import tiny_model, tiny_tokenizer


class Bomb:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain model, and an adapter over it, both as this package writes them."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    LanguageModel(model, tokenizer, Origin(model="x")).save(folder / "plain")
    policy = Policy.from_pretrained(folder / "plain", lora_rank=2)
    policy.save(folder / "adapter")
    Discriminator.create(policy).save(folder / "reward", training={})
    return folder


@pytest.fixture
def plain(saved, tmp_path):
    return Path(shutil.copytree(saved / "plain", tmp_path / "plain"))


@pytest.fixture
def adapter(saved, tmp_path):
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


def write(path, **changes):
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "a.ckpt"])
def test_a_folder_of_pickles_is_refused_and_nothing_of_it_runs(plain, tmp_path, name):
    (plain / "model.safetensors").unlink()
    (plain / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=f"weights as pickles .{name}.*expected safetensors"):
        Policy.from_pretrained(plain)
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_are_not_looked_at(plain, tmp_path):
    (plain / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    Policy.from_pretrained(plain)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model.safetensors", "/x/model.safetensors", 1]
)
def test_an_index_names_safetensors_of_its_folder_alone(plain, name):
    (plain / "model.safetensors").rename(plain / "shard.safetensors")
    write(plain / "model.safetensors.index.json", metadata={}, weight_map={"a": name})
    with pytest.raises(ValueError, match="expected safetensors files in its folder"):
        Policy.from_pretrained(plain)


def test_what_gets_past_the_checks_still_cannot_be_unpickled(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(1)}, path)
    with no_pickle(), pytest.raises(ValueError, match=r"a.bin' is a pickle, expected safetensors"):
        torch.load(path)
    assert torch.load(path)["a"] == 0


def test_transformers_own_fallback_is_refused(plain, tmp_path, monkeypatch):
    """The first check left out: transformers itself then takes the index's word for .bin."""
    monkeypatch.setattr("airl_fast.loading.check_model_folder", lambda *_: None)
    (plain / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), plain / "pytorch_model.bin")
    names = tiny_model("llama").state_dict()
    write(
        plain / "model.safetensors.index.json",
        metadata={},
        weight_map=dict.fromkeys(names, "pytorch_model.bin"),
    )
    with pytest.raises(ValueError, match="is a pickle, expected safetensors"):
        Policy.from_pretrained(plain)


def test_an_adapter_is_a_lora_in_safetensors(adapter, tmp_path):
    Policy.from_pretrained(adapter)
    weights = adapter / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        Policy.from_pretrained(adapter)
    assert not (tmp_path / "ran").exists()
    weights.write_bytes(kept)
    for changes in (
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"megatron_config": {}, "megatron_core": "antigravity"},
    ):
        before = (adapter / "adapter_config.json").read_text()
        write(adapter / "adapter_config.json", **changes)
        with pytest.raises(ValueError, match="expected a plain LoRA adapter, received"):
            Policy.from_pretrained(adapter)
        with pytest.raises(ValueError, match="expected a plain LoRA adapter, received"):
            check_model_folder(adapter)
        (adapter / "adapter_config.json").write_text(before)


CODE = """
import pathlib
pathlib.Path({mark!r}).mkdir()
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig): model_type = "mine"
class M(LlamaForCausalLM): config_class = C
"""


@pytest.fixture
def with_code(plain, tmp_path):
    """A model whose folder brings code of its own, which leaves a mark."""
    (plain / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    write(plain / "config.json", model_type="mine", auto_map=names)
    return plain


def test_code_of_a_repository_does_not_run_unless_asked_for(with_code, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        Policy.from_pretrained(with_code)
    assert not (tmp_path / "ran").exists()


def test_a_saved_folder_cannot_ask_for_code_in_the_users_name(
    with_code, adapter, saved, tmp_path, monkeypatch
):
    """A reward or policy that somebody gives away names its base model, and says to trust it."""
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    origin = {"model": str(with_code), "gguf_file": None, "trust_remote_code": True}
    write(adapter / "airl_fast.json", origin=origin)
    with pytest.raises(ValueError, match=f"If you trust that, set {TRUST_VARIABLE}=1"):
        Policy.from_pretrained(adapter)
    reward = Path(shutil.copytree(saved / "reward", tmp_path / "reward"))
    body = json.loads((reward / "airl_fast.json").read_text())["body"]
    write(reward / "airl_fast.json", body={**body, "adapter": "policy", "origin": origin})
    with pytest.raises(ValueError, match=f"If you trust that, set {TRUST_VARIABLE}=1"):
        Discriminator.from_pretrained(reward)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_internal": "somebody/attention"},
        {"text_config": {"attn_implementation": "somebody/attention@main"}},
        {"inner": [{"trust_remote_code": True}]},
    ],
)
def test_a_configuration_cannot_name_code(plain, changes):
    write(plain / "config.json", **changes)
    with pytest.raises(ValueError, match="which asks for code from elsewhere"):
        Policy.from_pretrained(plain)


@pytest.mark.parametrize("name", ["../a.gguf", "/tmp/a.gguf"])
def test_a_gguf_file_is_inside_its_folder(plain, name):
    with pytest.raises(ValueError, match="expected a GGUF file inside"):
        Policy.from_pretrained(plain, gguf_file=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "load"}, "expected a dtype of float32"),
        ({"dtype": None}, "expected a dtype of float32"),
        ({"origin": {"model": 1}}, "'origin' does not say where the base model is"),
        ({"origin": None}, "'origin' does not say where the base model is"),
        ({"kind": ["x"]}, r"holds a \['x'\], expected a 'policy'"),
    ],
)
def test_a_description_that_cannot_be_is_named(adapter, changes, message):
    write(adapter / "airl_fast.json", **changes)
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(adapter)


def test_metadata_that_is_no_json_is_named(adapter):
    for text, message in (
        ("[1]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"a": ' * 20_000, "nested too deeply"),
        ('{"kind": "policy", "kind": "policy"}', "the key 'kind' twice"),
    ):
        (adapter / "airl_fast.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_metadata(adapter, "policy")


def test_what_a_reward_was_trained_for_is_checked(tmp_path):
    training = {"granularity": "step", "interval": 3, "boundary": "\n", "logit": "f", "reward": "f",
                "temperature": 1.0, "task": "t"}  # fmt: skip
    for changes, message in (
        ({"interval": 0}, "expected an interval of 1 or more"),
        ({"interval": "3"}, "training.interval: Input should be a valid integer"),
        ({"temperature": float("inf")}, "a finite temperature"),
        ({"boundary": "("}, "no regular expression"),
        ({"granularity": "x"}, "training.granularity"),
    ):
        write(tmp_path / "airl_fast.json", kind="discriminator", training={**training, **changes})
        with pytest.raises(ValueError, match=message):
            read_trained(tmp_path)
    write(tmp_path / "airl_fast.json", kind="discriminator", training=3)
    with pytest.raises(ValueError, match="'training' is 3, expected an object"):
        read_trained(tmp_path)


def test_a_reward_without_its_head_says_so(saved, tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "discriminator_head.safetensors")
    with pytest.raises(ValueError, match="holds no trained reward"):
        RewardScorer.from_pretrained(tmp_path)
