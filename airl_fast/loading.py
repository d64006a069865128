"""Causal language models from a hub name or a folder, with or without LoRA, and back to disk.

Weights are read and written as safetensors; GGUF files are read through transformers and
dequantised. No pickle is loaded, and code from a model's repository runs only if asked for.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from airl_fast.language_model import LanguageModel, Origin, set_adapter
from airl_fast.loading_checks import check_folder, check_options, known_device, whole_weights
from airl_fast.metadata import METADATA, saved_dtype
from airl_fast.model_files import check_adapter, check_model_folder, check_remote_code, no_pickle

_BUILT_IN = {
    name: f"tasks/assets/{name}"
    for name in ("arithmetic-base", "countdown-base", "countdown-base-small")
}
_ORIGIN = TypeAdapter(Origin)


def resolve(name: str) -> str:
    """Turn the name of a model that ships with the package into its folder."""
    return str(files("airl_fast") / _BUILT_IN[name]) if name in _BUILT_IN else name


def load_language_model(
    origin: Origin,
    *,
    dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    adapter: str = "policy",
    device: str | torch.device = "cpu",
) -> LanguageModel:
    """Load a causal language model, with a fresh LoRA adapter when ``lora_rank`` > 0.

    Args:
        origin: hub name or folder (and the GGUF file inside it); "arithmetic-base" is built in.
        dtype: of the weights.
        lora_rank: rank of the adapter on every linear layer but the head; 0 trains all weights.
        lora_alpha: LoRA's scale times its rank.
        adapter: name of the adapter.
        device: where the weights go.

    Raises:
        ValueError: the model mixes tokens in a way that packing does not keep apart, or has a
            head that the operators do not know; or its weights are pickles.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = known_device(device)
    check_options(dtype, lora_rank)
    path = resolve(origin.model)
    check_model_folder(Path(path), origin.gguf_file)
    check_folder(path, origin.gguf_file)
    where = {
        "trust_remote_code": origin.trust_remote_code,
        "gguf_file": origin.gguf_file,
    }
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    options = {} if origin.gguf_file else {"use_safetensors": True}
    with no_pickle(), whole_weights(path):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where, **options)
    if origin.gguf_file:
        _forget_quantisation(model)
        _take_special_tokens(tokenizer, model.config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device).eval()
    if not lora_rank:
        return LanguageModel(model, tokenizer, origin)
    return LanguageModel(
        _with_adapter(model, adapter, lora_rank, lora_alpha), tokenizer, origin, adapter
    )


def _take_special_tokens(tokenizer: Any, config: Any) -> None:
    """Have the tokenizer end texts as the file says.

    transformers 5.17 reads the ids of a GGUF file into the configuration alone, so that SmolLM2's
    texts would end with ``<|im_start|>``; 5.24 has them in the tokenizer, too.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(config, f"{name}_id", None)
        if index is not None and getattr(tokenizer, f"{name}_id") != index:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))


def add_adapter(body: LanguageModel, adapter: str, rank: int, alpha: int) -> LanguageModel:
    """A second language model over the backbone of ``body``, with an adapter of its own."""
    if body.adapter is None:
        raise ValueError(
            "a shared backbone needs LoRA on both models: the policy was loaded with full weights; "
            "set policy.lora_rank and discriminator.lora_rank, or discriminator.trunk='own'"
        )
    model: Any = body.model
    model.add_adapter(adapter, _lora(rank, alpha))
    set_adapter(model, body.adapter)
    return LanguageModel(model, body.tokenizer, body.origin, adapter)


def load_saved(
    directory: Path,
    description: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load what ``LanguageModel.save`` wrote, with the same bits unless ``dtype`` is another.

    Raises:
        ValueError: the description is none; or it asks for code of a repository, which neither
            ``trust_remote_code`` nor AIRL_FAST_TRUST_REMOTE_CODE=1 allows.
    """
    adapter, dtype = description.get("adapter"), dtype or saved_dtype(directory, description)
    if adapter is None:
        return load_language_model(Origin(model=str(directory)), dtype=dtype, device=device)
    from peft import PeftModel

    origin = _origin(directory, description)
    check_remote_code(trust_remote_code, origin.trust_remote_code, directory)
    check_adapter(directory)
    base = load_language_model(origin, dtype=dtype, device=device)
    with no_pickle(), whole_weights(directory):
        model = PeftModel.from_pretrained(
            base.causal_lm, directory, adapter_name=adapter, is_trainable=True
        ).eval()
    return LanguageModel(model, base.tokenizer, origin, adapter)


def _origin(directory: Path, description: dict[str, Any]) -> Origin:
    try:
        return _ORIGIN.validate_json(json.dumps(description.get("origin")), strict=True)
    except ValidationError as error:
        raise ValueError(
            f"{directory / METADATA}: 'origin' does not say where the base model is "
            f"({error.errors(include_url=False)[0]['msg']}); restore it from a copy"
        ) from None


def _lora(rank: int, alpha: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", bias="none"
    )


def _with_adapter(model: Any, adapter: str, rank: int, alpha: int) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, _lora(rank, alpha), adapter_name=adapter)


def _forget_quantisation(model: Any) -> None:
    """A GGUF model in plain floating-point weights, which can be trained and saved."""
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        model.dequantize()
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
