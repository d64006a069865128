"""The policy: a language model that is sampled and improved; operators alone touch its head."""

from __future__ import annotations

from pathlib import Path

import torch

from airl_fast.language_model import LanguageModel, Origin
from airl_fast.loading import load_language_model, load_saved
from airl_fast.metadata import METADATA, read_metadata, saved_dtype, write_metadata


class Policy(LanguageModel):
    """The policy pi: a causal language model that is sampled and improved."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        gguf_file: str | None = None,
        dtype: torch.dtype | None = None,
        lora_rank: int = 0,
        lora_alpha: int = 16,
        trust_remote_code: bool = False,
        device: str | torch.device = "cpu",
    ) -> Policy:
        """Load a policy from a hub name, a folder, or a folder written by ``save``.

        Args:
            name: hub name, local folder, or "arithmetic-base".
            gguf_file: a GGUF file inside it, dequantised on loading (needs the gguf extra).
            dtype: of the weights; None: that of a folder written by ``save``, float32 of others.
            lora_rank: train an adapter of this rank; 0 trains all weights, or the adapter that a
                saved policy has.
            lora_alpha: LoRA's scale times its rank.
            trust_remote_code: run model code from the repository.
            device: where the weights go.

        Raises:
            ValueError: the folder holds an adapter of another rank than ``lora_rank``.
        """
        saved = None
        if (Path(name) / METADATA).is_file():
            saved = read_metadata(Path(name), "policy")
        if saved and (saved.get("adapter") or not lora_rank):
            body = load_saved(
                Path(name),
                saved,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
            )
            rank = body.model.peft_config[body.adapter].r if body.adapter else 0
            if lora_rank and rank != lora_rank:
                raise ValueError(
                    f"{name} holds an adapter of rank {rank}, received lora_rank={lora_rank}: "
                    f"give lora_rank={rank} (or 0) to go on training it"
                )
        else:
            own = saved_dtype(Path(name), saved) if saved else torch.float32
            body = load_language_model(
                Origin(model=str(name), gguf_file=gguf_file, trust_remote_code=trust_remote_code),
                dtype=dtype or own,
                lora_rank=lora_rank,
                lora_alpha=lora_alpha,
                device=device,
            )
        return cls(body.model, body.tokenizer, body.origin, body.adapter)

    def save(self, directory: str | Path) -> None:
        """Write the policy so that ``from_pretrained`` (and transformers or PEFT) reads it."""
        super().save(directory)
        if self.world.first:
            write_metadata(Path(directory), "policy", self.describe())
