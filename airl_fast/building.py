"""The models that a configuration asks for."""

from __future__ import annotations

import torch

from airl_fast.batches import derive_seed
from airl_fast.config import RunConfig
from airl_fast.models import Discriminator, Policy


def load_policy(config: RunConfig, device: torch.device | None = None) -> Policy:
    """The policy; a fresh adapter is drawn from the run's seed.

    Args:
        config: of the run.
        device: where the weights go; by default ``run.device``, or a GPU where there is one.
    """
    policy = config.policy
    torch.manual_seed(derive_seed(config.run.seed, "policy adapter", 0))
    return Policy.from_pretrained(
        policy.model,
        gguf_file=policy.gguf_file,
        dtype=getattr(torch, policy.dtype),
        lora_rank=policy.lora_rank,
        lora_alpha=policy.lora_alpha,
        device=device or config.run.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def create_discriminator(config: RunConfig, policy: Policy) -> Discriminator:
    """A fresh discriminator for the policy; an adapter is drawn from the run's seed."""
    disc = config.discriminator
    torch.manual_seed(derive_seed(config.run.seed, "discriminator adapter", 0))
    options = {"kappa": disc.kappa, "offset": disc.offset} if disc.head == "lm" else {}
    return Discriminator.create(
        policy,
        head=disc.head,
        trunk=disc.trunk,
        model=disc.model,
        gguf_file=disc.gguf_file,
        lora_rank=disc.lora_rank,
        lora_alpha=disc.lora_alpha,
        shaping_gamma=disc.shaping_gamma if disc.shaping else None,
        span_logp=disc.span_logp,
        **options,
    )
