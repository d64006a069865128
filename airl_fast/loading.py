"""Causal language models from a hub name or a folder, with or without LoRA, and back to disk.

Weights are read and written as safetensors; GGUF files are read through transformers and
dequantised. No pickle is loaded, and code from a model's repository runs only if asked for.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from airl_fast.attention import (
    Continuation,
    continued_forward,
    enable_packed_attention,
    packed_forward,
    standard_attention,
)
from airl_fast.distributed import Shards, World, gathered
from airl_fast.fused import fuse
from airl_fast.loading_checks import check_folder, check_options, known_device, whole_weights
from airl_fast.model_files import check_adapter, check_model_folder, check_remote_code, no_pickle
from airl_fast.ops.linear_logprob import linear_logprob
from airl_fast.packing import PackedBatch
from airl_fast.parsing import parse_object, shown

METADATA = "airl_fast.json"
T = TypeVar("T")
_BUILT_IN = {
    name: f"tasks/assets/{name}"
    for name in ("arithmetic-base", "countdown-base", "countdown-base-small")
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the base weights came from: what an adapter needs to be loaded again."""

    model: str
    gguf_file: str | None = None
    trust_remote_code: bool = False


_ORIGIN = TypeAdapter(Origin)


@dataclass(frozen=True)
class Head:
    """The linear head of a language model, as the operators take it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the head for ``linear_logprob`` and its relatives."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def transforms_like(self, other: "Head") -> bool:
        """Whether the other head differs in its weight alone."""
        if (self.softcap, self.logit_scale) != (other.softcap, other.logit_scale):
            return False
        if self.bias is None or other.bias is None:
            return self.bias is other.bias
        return torch.equal(self.bias, other.bias)


class LanguageModel(nn.Module):
    """A causal language model that takes packed batches and never forms its logits.

    Two of them may share one backbone: each then owns one LoRA adapter of the same PEFT model.
    """

    model: Any  # a PreTrainedModel, or a PeftModel around one
    shards: Shards | None = None  # set where the weights are in pieces on several processes

    def __init__(
        self, model: nn.Module, tokenizer: Any, origin: Origin, adapter: str | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.origin = origin
        self.adapter = adapter
        enable_packed_attention(self.causal_lm)
        fuse(self.causal_lm)
        self._check_head()

    @property
    def causal_lm(self) -> Any:
        """The transformers model, inside its PEFT wrapper if it has one."""
        return self.model.get_base_model() if self.adapter else self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def world(self) -> World:
        """The processes that work on what this model is given; one, unless it is sharded."""
        return self.shards.world if self.shards else World(device=self.device)

    def shard(self, world: World, beside: "LanguageModel | None" = None) -> None:
        """Cut the weights in pieces, one on each process; a lone process keeps them whole.

        Args:
            world: the processes; each has loaded the same weights.
            beside: a sharded model whose backbone this one shares.
        """
        if world.size == 1:
            return
        if beside is not None and beside.model is self.model:
            self.shards = beside.shards
        else:
            self.shards = Shards(self.model, self.causal_lm._no_split_modules or (), world)

    def inside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function where the head's parameters are whole, if the model is sharded.

        What reads ``head`` and goes backward belongs into one call, hidden states included.
        """
        if self.shards is None:
            return function(*arguments)
        return self.shards.run(partial(function, *arguments))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every weight whole on every process, to sample: passes then wait for nobody."""
        with self.shards.whole() if self.shards else nullcontext():
            yield

    @property
    def context(self) -> float:
        """Tokens that the model takes; infinite where its configuration does not say."""
        limit = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return float("inf") if limit is None else limit

    @property
    def head(self) -> Head:
        """The head's parameters; reading them never copies or casts them."""
        linear = self.causal_lm.get_output_embeddings()
        config = self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        return Head(
            weight=linear.weight,
            bias=getattr(linear, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=scale if scale is not None else 1.0 / divisor if divisor else 1.0,
        )

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states of a packed batch, [T, D] in the model's dtype."""
        return self.inside(self._hidden, batch)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        with self.active():
            return packed_forward(self.causal_lm.base_model, batch)

    def continued(
        self, input_ids: Tensor, before: Continuation | None = None
    ) -> tuple[Tensor, Continuation]:
        """Last hidden states [C, D] of one text alone, or of what continues one that was."""
        with self.active():
            return continued_forward(self.causal_lm.base_model, input_ids, before)

    def logprob(
        self, hidden: Tensor, batch: PackedBatch, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """log pi of every action and the entropy there, both [N], from ``hidden`` [T, D]."""
        return self.inside(self._logprob, hidden, batch, temperature)

    def _logprob(
        self, hidden: Tensor, batch: PackedBatch, temperature: float
    ) -> tuple[Tensor, Tensor]:
        head = self.head
        return linear_logprob(
            hidden[batch.state_index],
            head.weight,
            batch.targets,
            temperature=temperature,
            return_entropy=True,
            **head.arguments(),
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Route the forward pass through this model's own adapter."""
        if self.adapter is None or self.model.active_adapter == self.adapter:
            yield
            return
        before = self.model.active_adapter
        set_adapter(self.model, self.adapter)
        try:
            yield
        finally:
            set_adapter(self.model, before)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that this model trains: its adapter's, or all of them."""
        marker = f".{self.adapter}." if self.adapter else ""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and marker in name
        }

    def save(self, directory: str | Path) -> None:
        """Write weights (an adapter alone, where there is one) and tokenizer as safetensors.

        Of several processes all call it, and the first writes.
        """
        marker = f".{self.adapter}." if self.adapter else ""
        parameters = self.model.state_dict(keep_vars=True)
        weights = gathered({k: v for k, v in parameters.items() if marker in k}, self.world)
        if not self.world.first:
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            self.model.save_pretrained(directory, state_dict=weights)
        else:
            from peft import get_peft_model_state_dict

            # The default asks the hub whether the vocabulary grew; embeddings are never trained.
            state = get_peft_model_state_dict(
                self.model, weights, adapter_name=self.adapter, save_embedding_layers=False
            )
            tensors = {name: value.contiguous() for name, value in state.items()}
            save_file(tensors, directory / "adapter_model.safetensors")
            self.model.peft_config[self.adapter].save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def describe(self) -> dict[str, Any]:
        """What ``load_saved`` needs to know beside the weights."""
        return {
            "adapter": self.adapter,
            "origin": asdict(self.origin) if self.adapter else None,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
        }

    def _check_head(self) -> None:
        linear = self.causal_lm.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"the language-model head is a {type(linear).__name__}, expected a plain Linear: "
                "an adapter or a quantised layer on the head would be ignored by the fused "
                "operators; merge it into the head, or leave the head out of its targets"
            )
        if self.causal_lm.device.type == "meta":
            return
        # An unknown transformation of the logits (a new model family) must not pass unseen.
        ids = torch.arange(3, device=self.device)[None] % linear.weight.shape[0]
        with torch.no_grad(), self.active(), standard_attention(self.causal_lm):
            output = self.causal_lm(ids, use_cache=False, output_hidden_states=True)
        head = self.head
        logits = output.hidden_states[-1].float() @ head.weight.float().T
        logits = head.logit_scale * (logits + (0 if head.bias is None else head.bias.float()))
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        error = (logits - output.logits.float()).abs().max().item()
        scale = output.logits.float().abs().max().item()
        tolerance = 1e-3 if linear.weight.dtype == torch.float32 else 5e-2
        if not error <= tolerance * max(scale, 1.0):
            raise ValueError(
                f"{type(self.causal_lm).__name__} does something to its logits beyond bias, scale "
                f"and soft-capping (largest difference {error:.3g}): its log-probabilities would "
                "be wrong; this model is not supported"
            )


def set_adapter(model: Any, name: str) -> None:
    """Activate an adapter and leave every adapter trainable (PEFT freezes the inactive ones)."""
    model.set_adapter(name)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name:
            parameter.requires_grad_(True)


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
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {} if origin.gguf_file else {"use_safetensors": True}
    with no_pickle(), whole_weights(path):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where, **options)
    if origin.gguf_file:
        _forget_quantisation(model)
    model.to(device).eval()
    if not lora_rank:
        return LanguageModel(model, tokenizer, origin)
    return LanguageModel(
        _with_adapter(model, adapter, lora_rank, lora_alpha), tokenizer, origin, adapter
    )


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
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load what ``LanguageModel.save`` wrote, with the same bits.

    Raises:
        ValueError: the description is none; or it asks for code of a repository, which neither
            ``trust_remote_code`` nor AIRL_FAST_TRUST_REMOTE_CODE=1 allows.
    """
    adapter, dtype = description.get("adapter"), saved_dtype(directory, description)
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


def saved_dtype(directory: Path, description: dict[str, Any]) -> torch.dtype:
    """The dtype that a description names.

    Raises:
        ValueError: it names none that weights are saved in.
    """
    name = description.get("dtype")
    if name not in _DTYPES:
        raise ValueError(
            f"{directory / METADATA}: expected a dtype of {', '.join(_DTYPES)}, received "
            f"{shown(name)}; restore it from a copy"
        )
    found: torch.dtype = getattr(torch, name)
    return found


def _origin(directory: Path, description: dict[str, Any]) -> Origin:
    try:
        return _ORIGIN.validate_json(json.dumps(description.get("origin")), strict=True)
    except ValidationError as error:
        raise ValueError(
            f"{directory / METADATA}: 'origin' does not say where the base model is "
            f"({error.errors(include_url=False)[0]['msg']}); restore it from a copy"
        ) from None


def read_metadata(directory: Path, kind: str) -> dict[str, Any]:
    """Read the description beside saved weights and check that it is of the expected kind."""
    path = directory / METADATA
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {METADATA}: expected a {kind} saved by airl_fast; give the "
            "folder that training wrote (DIR/policy or DIR/reward)"
        )
    try:
        metadata = parse_object(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; train again, or restore it from a copy") from None
    if metadata.get("kind") != kind:
        raise ValueError(f"{directory} holds a {shown(metadata.get('kind'))}, expected a {kind!r}")
    return metadata


def write_metadata(directory: Path, kind: str, values: dict[str, Any]) -> None:
    """Write the description that ``read_metadata`` reads."""
    text = json.dumps({"format": 1, "kind": kind, **values}, indent=2, sort_keys=True)
    (directory / METADATA).write_text(text + "\n")


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
