"""The discriminator: a language model whose head operators alone touch.

Its energy f(s, a) has one of two heads:

- ``lm``: f = kappa * log q(a|s) + b, with q a language model that starts as a copy of the policy
  and kappa, b trained. With kappa = 1, b = 0 the reward f - log pi starts at exactly zero, and
  AIRL's optimum (f = log pi of the expert, up to shaping) is inside the family.
- ``score``: one linear row read at the span's last action; with a second row h it is the shaped
  form f = g + gamma * h(s') - h(s) of Fu et al. 2018 (arXiv 1710.11248).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from airl_fast.distributed import World
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.loading import add_adapter, load_language_model, load_saved
from airl_fast.loading_checks import known_device, whole_weights
from airl_fast.metadata import read_metadata, write_metadata
from airl_fast.ops.airl_score import AIRLScore, airl_score
from airl_fast.ops.linear_logprob import linear_logprob
from airl_fast.ops.segments import segment_mean, segment_sum
from airl_fast.packing import PackedBatch, Trace, pack

HeadKind = Literal["lm", "score"]
Trunk = Literal["own", "shared", "policy"]
SpanLogp = Literal["sum", "mean"]


class Discriminator(nn.Module):
    """The energy f(s, a) of AIRL's discriminator D = sigmoid(f - log pi).

    Build one with ``create`` or ``from_pretrained``.
    """

    def __init__(
        self,
        body: LanguageModel | None,
        *,
        head: HeadKind,
        trunk: Trunk,
        width: int,
        shaping_gamma: float | None = None,
        span_logp: SpanLogp = "sum",
        kappa: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        _check_parts(head, trunk, span_logp, shaping_gamma)
        if (body is None) != (trunk == "policy"):
            raise ValueError("a discriminator owns a body unless trunk='policy'")
        if trunk == "policy" and head != "score":
            raise ValueError("trunk='policy' reads f from the policy's states: use head='score'")
        if shaping_gamma is not None and head != "score":
            raise ValueError("shaping needs the second row of a 'score' head, received head='lm'")
        self.body = body
        self.head_kind: HeadKind = head
        self.trunk: Trunk = trunk
        self.shaping_gamma = shaping_gamma
        self.span_logp: SpanLogp = span_logp
        self.width = width
        self.world = World()
        if head == "lm":
            self.kappa = nn.Parameter(torch.tensor(kappa))
            self.offset = nn.Parameter(torch.tensor(offset))
        else:
            rows = 1 if shaping_gamma is None else 2
            # Zero rows start f at zero everywhere, whatever the seed.
            self.weight = nn.Parameter(torch.zeros(rows, width))
            self.bias = nn.Parameter(torch.zeros(rows))

    @classmethod
    def create(
        cls,
        policy: LanguageModel,
        *,
        head: HeadKind = "lm",
        trunk: Trunk = "own",
        model: str | None = None,
        gguf_file: str | None = None,
        lora_rank: int = 0,
        lora_alpha: int = 16,
        **options: Any,
    ) -> Discriminator:
        """A fresh discriminator for a policy.

        Args:
            policy: gives the base weights (a copy, a shared backbone or its own states).
            head: ``lm`` or ``score``.
            trunk: ``own`` weights, a ``shared`` frozen backbone with an adapter each, or the
                ``policy``'s detached hidden states.
            model: hub name or folder of another base model (``own`` only).
            gguf_file: a GGUF file inside it.
            lora_rank: rank of the adapter; 0 trains all weights (``own`` only).
            lora_alpha: LoRA's scale times its rank.
            **options: ``shaping_gamma``, ``span_logp``, ``kappa``, ``offset``.

        Raises:
            ValueError: the parts contradict each other, the tokenizers differ, or an lm head
                cannot start as a copy of the policy (``copy_body``).
        """
        body: LanguageModel | None
        _check_parts(head, trunk, options.get("span_logp", "sum"), options.get("shaping_gamma"))
        if model is not None and trunk != "own":
            raise ValueError(
                f"trunk={trunk!r} uses the policy's model, received model={model!r}: leave it out, "
                "or use trunk='own'"
            )
        if trunk == "policy":
            body = None
        elif trunk == "shared":
            if lora_rank < 1:
                raise ValueError(
                    f"trunk='shared' is two adapters over one frozen backbone, received lora_rank="
                    f"{lora_rank}: give it a rank of 1 or more"
                )
            body = add_adapter(policy, "discriminator", lora_rank, lora_alpha)
        else:
            origin = Origin(model=model, gguf_file=gguf_file) if model else policy.origin
            body = load_language_model(
                origin,
                dtype=policy.head.weight.dtype,
                lora_rank=lora_rank,
                lora_alpha=lora_alpha,
                adapter="discriminator",
                device=policy.device,
            )
            if body.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
                raise ValueError(
                    f"the discriminator {origin.model!r} has another tokenizer than the policy "
                    f"{policy.origin.model!r}: expected equal vocabularies; use a model of the "
                    "same family"
                )
        width = (body or policy).head.weight.shape[1]
        discriminator = cls(body, head=head, trunk=trunk, width=width, **options)
        discriminator.to(policy.device)  # the head, which lies where it was made
        # The policy may have been trained since it left its origin.
        if body is not None and model is None:
            if _shapes(body) == _shapes(policy):
                discriminator.copy_body(policy)
            elif head == "lm" and not _same_states(body, policy):
                raise ValueError(_UNLIKE)
        return discriminator

    def f(self, batch: PackedBatch, policy_hidden: Tensor | None = None) -> Tensor:
        """The energy of every span, [S] float32, with gradients.

        Args:
            batch: a packed batch.
            policy_hidden: [T, D], needed by ``trunk="policy"`` alone; detached here.
        """
        if self.body is None:
            return self._f(batch, policy_hidden)
        return self.body.inside(self._f, batch, policy_hidden)

    def _f(self, batch: PackedBatch, policy_hidden: Tensor | None) -> Tensor:
        return self.energies(batch, self._hidden(batch, policy_hidden))

    def energies(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        """The energy of every span [S], as ``f``, from the hidden states [T, F] that it reads."""
        if self.head_kind == "lm":
            assert self.body is not None
            head = self.body.head
            logq = linear_logprob(
                hidden[batch.state_index], head.weight, batch.targets, **head.arguments()
            )
            return self._combine(self.kappa * logq + self.offset, batch)
        last_action = batch.action_index[batch.cu_spans[1:].long() - 1]
        rows = hidden[last_action].float() @ self.weight.T + self.bias
        if self.shaping_gamma is None:
            return rows[:, 0]
        g, h = rows.unbind(1)
        starts, ends = batch.cu_seq_spans[:-1].long(), batch.cu_seq_spans[1:].long() - 1
        before = torch.cat([h.new_zeros(1), h[:-1]]).index_fill(0, starts, 0.0)
        after = h.index_fill(0, ends, 0.0)
        return g + self.shaping_gamma * after - before

    @torch.no_grad()
    def score(
        self,
        batch: PackedBatch,
        policy: LanguageModel,
        *,
        form: Literal["airl", "logit"] = "airl",
        temperature: float = 1.0,
    ) -> AIRLScore:
        """Reward and f of every span, log pi and entropy of every action, without gradients.

        One call of the fused ``airl_score`` operator; see there for shapes. That operator has one
        bias, soft-capping and scale for both heads: where they differ, it takes two calls.
        """
        policy_hidden = policy.hidden(batch)
        hidden = self._hidden(batch, policy_hidden)
        return self.score_states(
            batch, policy, hidden, policy_hidden, form=form, temperature=temperature
        )

    @torch.no_grad()
    def score_states(
        self,
        batch: PackedBatch,
        policy: LanguageModel,
        hidden: Tensor,
        policy_hidden: Tensor,
        *,
        form: Literal["airl", "logit"] = "airl",
        temperature: float = 1.0,
    ) -> AIRLScore:
        """``score`` from hidden states: [T, F] that f is read from, [T, D] of the policy."""
        policy_head = policy.head
        if self.head_kind == "lm":
            assert self.body is not None
            if not policy_head.transforms_like(self.body.head):
                f = self.energies(batch, hidden)
                logp, entropy = policy.logprob(policy_hidden, batch, temperature)
                reward = f - self._combine(logp, batch) if form == "airl" else f
                return AIRLScore(reward=reward, f=f, logp=logp, entropy=entropy)
            rows, weight = batch.state_index, self.body.head.weight
            extra: dict[str, Any] = {
                "disc_scale": float(self.kappa),
                "disc_bias": self.offset.detach().reshape(1),
            }
        else:
            rows, weight = batch.action_index, self.weight
            extra = {"disc_bias": self.bias.detach()}
            if self.shaping_gamma is not None:
                extra["shaping_gamma"] = self.shaping_gamma
                extra["cu_seq_spans"] = batch.cu_seq_spans
        return airl_score(
            policy_hidden[batch.state_index],
            policy_head.weight,
            batch.targets,
            hidden[rows],
            weight,
            batch.cu_spans,
            disc_head=self.head_kind,
            span_logp=self.span_logp,
            form=form,
            temperature=temperature,
            **policy_head.arguments(),
            **extra,
        )

    def copy_body(self, policy: LanguageModel) -> None:
        """Start the body from the policy's present weights (q = pi).

        Raises:
            ValueError: the two train different parameters (full weights and LoRA, or other ranks
                or scales).
        """
        if self.body is None:
            return
        if _shapes(self.body) != _shapes(policy):
            raise ValueError(_UNLIKE)
        with torch.no_grad():
            pairs = zip(self.body.trainable().values(), policy.trainable().values(), strict=True)
            for own, other in pairs:
                own.copy_(other)

    def shard(self, policy: LanguageModel) -> None:
        """Cut the body in pieces among the policy's processes; the head stays whole on each."""
        self.world = policy.world
        if self.body is not None:
            self.body.shard(self.world, beside=policy)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the discriminator trains; its own head's start with ``head.``."""
        body = self.body.trainable() if self.body is not None else {}
        return {**{f"body.{k}": v for k, v in body.items()}, **self.head_parameters()}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """kappa and offset, or the score rows."""
        names = ("kappa", "offset") if self.head_kind == "lm" else ("weight", "bias")
        return {f"head.{name}": getattr(self, name) for name in names}

    def save(self, directory: str | Path, *, training: dict[str, Any] | None = None) -> None:
        """Write the discriminator and, for ``RewardScorer``, what it was trained for.

        Of several processes all call it, and the first writes.

        Args:
            directory: where to; made if it does not exist.
            training: the fields of ``scores.Trained``.
        """
        directory = Path(directory)
        if self.body is not None:
            self.body.save(directory)
        if not self.world.first:
            return
        directory.mkdir(parents=True, exist_ok=True)
        head = {name: value.detach().cpu() for name, value in self.head_parameters().items()}
        save_file(head, directory / "discriminator_head.safetensors")
        values = {
            "head": self.head_kind,
            "trunk": self.trunk,
            "width": self.width,
            "shaping_gamma": self.shaping_gamma,
            "span_logp": self.span_logp,
            "body": self.body.describe() if self.body is not None else None,
            "training": training or {},
        }
        write_metadata(directory, "discriminator", values)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Discriminator:
        """Load what ``save`` wrote, with the same bits. A shared backbone is loaded as its own.

        ``dtype``: of the body's weights, if not that which they were saved in.
        """
        directory, device = Path(directory), known_device(device)
        values = read_metadata(directory, "discriminator")
        body = None
        if values["body"]:
            body = load_saved(directory, values["body"], dtype=dtype, device=device)
        discriminator = cls(
            body,
            head=values["head"],
            trunk="policy" if body is None else "own",
            width=values["width"],
            shaping_gamma=values["shaping_gamma"],
            span_logp=values["span_logp"],
        )
        head_file = directory / "discriminator_head.safetensors"
        with whole_weights(head_file):
            saved = load_file(head_file)
        with torch.no_grad():
            for name, parameter in discriminator.head_parameters().items():
                parameter.copy_(saved[name])
        return discriminator.to(device)

    def _combine(self, values: Tensor, batch: PackedBatch) -> Tensor:
        combine = segment_sum if self.span_logp == "sum" else segment_mean
        return combine(values, batch.cu_spans)

    def _hidden(self, batch: PackedBatch, policy_hidden: Tensor | None) -> Tensor:
        if self.body is not None:
            return self.body.hidden(batch)
        if policy_hidden is None:
            raise ValueError("trunk='policy' needs the policy's hidden states: pass policy_hidden")
        return policy_hidden.detach()


def _check_parts(
    head: object, trunk: object, span_logp: object, shaping_gamma: float | None
) -> None:
    for name, value, known in (
        ("head", head, get_args(HeadKind)),
        ("trunk", trunk, get_args(Trunk)),
        ("span_logp", span_logp, get_args(SpanLogp)),
    ):
        if value not in known:
            *first, last = map(repr, known)
            raise ValueError(
                f"expected {name} {', '.join(first)} or {last}, received {value!r}: choose one"
            )
    if shaping_gamma is not None and not 0 <= shaping_gamma <= 1:
        raise ValueError(
            f"expected shaping_gamma, a discount in [0, 1], received {shaping_gamma}: use the "
            "discount of the returns"
        )


_UNLIKE = (
    "the discriminator cannot start from the policy's present weights: they train different "
    "parameters; give both the same lora_rank and lora_alpha"
)


def _shapes(model: LanguageModel) -> tuple[list[torch.Size], int | None]:
    """What two models must have in common for the weights of one to mean the same in the other."""
    alpha = model.model.peft_config[model.adapter].lora_alpha if model.adapter else None
    return [parameter.shape for parameter in model.trainable().values()], alpha


@torch.no_grad()
def _same_states(one: LanguageModel, other: LanguageModel) -> bool:
    """Whether two models of one origin still compute the same, tried on a few tokens."""
    ids = tuple(i % one.head.weight.shape[0] for i in range(8))
    probe = pack([Trace(prompt=ids[:1], completion=ids[1:], span_lengths=(7,))], device=one.device)
    return torch.allclose(one.hidden(probe), other.hidden(probe), rtol=1e-4, atol=1e-5)
