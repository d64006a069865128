"""The models that a configuration asks for."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from airl_fast.batches import derive_seed
from airl_fast.config import RunConfig
from airl_fast.discriminator import Discriminator
from airl_fast.loading_checks import default_device
from airl_fast.policy import Policy
from airl_fast.reward_folder import reward_folder


def load_policy(config: RunConfig, device: torch.device | None = None) -> Policy:
    """The policy; a fresh adapter is drawn from the run's seed.

    Args:
        config: of the run.
        device: where the weights go; by default ``run.device``, or a GPU where there is one.

    Raises:
        ValueError: a saved policy in float16, all of whose weights are to be trained.
    """
    policy = config.policy
    torch.manual_seed(derive_seed(config.run.seed, "policy adapter", 0))
    found = Policy.from_pretrained(
        policy.model,
        gguf_file=policy.gguf_file,
        dtype=_dtype(config),
        lora_rank=policy.lora_rank,
        lora_alpha=policy.lora_alpha,
        device=device or default_device(config.run.device),
    )
    if found.adapter is None and found.head.weight.dtype == torch.float16:
        raise ValueError(
            f"policy.model={policy.model} holds weights of float16, whose gradients round to zero; "
            "set policy.dtype=bfloat16 or float32, or policy.lora_rank"
        )
    return found


def load_measured(model: str | Path, config: RunConfig) -> Policy:
    """A policy that is not trained any more, in the dtype and on the device of its run.

    Models refer to themselves, so that one that is done with stays in memory until Python looks
    for cycles: it is freed first.

    Args:
        model: ``policy.model`` itself, or a folder that a run has written.
        config: of the run.
    """
    gc.collect()
    gguf_file = config.policy.gguf_file if str(model) == config.policy.model else None
    device = default_device(config.run.device)
    return Policy.from_pretrained(model, gguf_file=gguf_file, dtype=_dtype(config), device=device)


def _dtype(config: RunConfig) -> torch.dtype | None:
    return getattr(torch, config.policy.dtype) if config.policy.dtype else None


def create_discriminator(config: RunConfig, policy: Policy) -> Discriminator:
    """A discriminator for the policy: fresh, or the saved one that the configuration names.

    A fresh adapter is drawn from the run's seed.

    Raises:
        ValueError: the parts contradict each other, or ``discriminator.saved`` is no reward, one
            of another form than the configuration's, or one of another tokenizer.
    """
    disc = config.discriminator
    if disc.saved is not None:
        return _load_discriminator(config, policy)
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


def _load_discriminator(config: RunConfig, policy: Policy) -> Discriminator:
    disc = config.discriminator
    assert disc.saved is not None
    dtype = policy.head.weight.dtype
    found = Discriminator.from_pretrained(
        reward_folder(Path(disc.saved)),
        dtype=None if dtype == torch.float16 else dtype,  # in which no full weights are trained
        device=policy.device,
    )
    if found.body is None:
        raise ValueError(
            f"discriminator.saved={disc.saved!r} reads the hidden states of the policy that it was "
            "trained with: expected a reward with a model of its own (discriminator.trunk=own)"
        )
    gamma = disc.shaping_gamma if disc.shaping else None
    for key, asked, got in (
        ("head", disc.head, found.head_kind),
        ("span_logp", disc.span_logp, found.span_logp),
        ("shaping (its gamma)", gamma, found.shaping_gamma),
    ):
        if asked != got:
            raise ValueError(
                f"discriminator.saved={disc.saved!r} holds a reward with {key}={got}, and the "
                f"configuration says {asked}: set it to what was saved"
            )
    if found.body.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(
            f"discriminator.saved={disc.saved!r} has another tokenizer than the policy "
            f"{policy.origin.model!r}: expected equal vocabularies; start both from models of one "
            "family"
        )
    return found
