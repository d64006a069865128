"""A causal language model that takes packed batches and leaves its head to the fused operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from airl_fast.attention import (
    Kept,
    enable_packed_attention,
    packed_forward,
    standard_attention,
)
from airl_fast.batch_checks import rope_limit
from airl_fast.continuing import Continuation, continued_forward
from airl_fast.distributed import Shards, World, gathered
from airl_fast.fused import fuse
from airl_fast.lora import fuse_adapters
from airl_fast.ops.linear_logprob import linear_logprob
from airl_fast.packing import PackedBatch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the base weights came from: what an adapter needs to be loaded again."""

    model: str
    gguf_file: str | None = None
    trust_remote_code: bool = False


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

    def transformed(self, products: Tensor) -> Tensor:
        """The logits, from the products with the weight and their bias: scaled and soft-capped."""
        z = products if self.logit_scale == 1.0 else products * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

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
        fuse_adapters(self.causal_lm)
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
        """Tokens that the model takes in packed batches; infinite where nothing limits them."""
        config = self.causal_lm.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return min(float("inf") if limit is None else limit, rope_limit(config)[0])

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

    def hidden(self, batch: PackedBatch, keep: Kept | None = None) -> Tensor:
        """Last hidden states of a packed batch, [T, D] in the model's dtype.

        ``keep`` takes the keys and values of every attention layer.
        """
        return self.inside(self._hidden, batch, keep)

    def _hidden(self, batch: PackedBatch, keep: Kept | None) -> Tensor:
        with self.active():
            return packed_forward(self.causal_lm.base_model, batch, keep=keep)

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

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [R, V] float32 of a few states [R, D], whole: to draw from."""
        return self.head.transformed(self.causal_lm.get_output_embeddings()(hidden).float())

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
        logits = head.transformed(logits + (0 if head.bias is None else head.bias.float()))
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
