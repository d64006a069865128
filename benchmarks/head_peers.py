"""Other formulations of the head's log-probabilities and entropies, each written from its idea.

A formulation is a function ``(hidden [..., D], weight [V, D], targets [...], entropy) ->
(logp [...], entropy [...] or None)`` of plain tensors, differentiable by autograd.
"""

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import UnavailableError

Formulation = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]

_ENTROPY_ROWS = 128  # of a chunk in TRL's entropy helper


def materialised(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """What one writes first: all logits, their log softmax, gather."""
    log_probs = functional.log_softmax((hidden @ weight.T).float(), -1)
    logp = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return logp, -(log_probs.exp() * log_probs).sum(-1) if entropy else None


def selective(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """TRL's helper, restated from its description: gather the logit, log-sum-exp per sequence.

    The log softmax is never stored; entropies go by chunks of 128 rows.
    """
    logits = (hidden @ weight.T).float()
    taken = logits.gather(-1, targets[..., None]).squeeze(-1)
    logp = taken - torch.stack([torch.logsumexp(sequence, -1) for sequence in logits])
    if not entropy:
        return logp, None
    pieces = []
    for chunk in logits.flatten(0, -2).split(_ENTROPY_ROWS):
        log_probs = functional.log_softmax(chunk, -1)
        pieces.append(-(log_probs.exp() * log_probs).sum(-1))
    return logp, torch.cat(pieces).view_as(logp)


def trl_helper() -> tuple[Formulation, str]:
    """TRL's own helper if it is installed, else the restatement; and a note that says which."""
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError:
        return selective, "TRL is not installed: its formulation, restated; blocks of 128 rows"

    def helper(
        hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = (hidden @ weight.T).float()
        logp = selective_log_softmax(logits, targets)
        return logp, entropy_from_logits(logits) if entropy else None

    return helper, f"trl {version('trl')}, selective_log_softmax; blocks of 128 rows, no padding"


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Torch's linear_cross_entropy with its default chunking.

    Raises:
        UnavailableError: before torch 2.13, or when an entropy is asked for.
    """
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    if entropy:
        raise UnavailableError("linear_cross_entropy gives no entropy")
    loss = functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    )
    return -loss, None


def require_compiler() -> None:
    """Raise UnavailableError where torch.compile cannot work on a CPU."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UnavailableError("torch.compile needs a C++ compiler (g++ or clang++)")


def liger_log_probs() -> UnavailableError:
    """Why liger-kernel's fused linear cross-entropy cannot stand beside these on this machine."""
    return UnavailableError(
        f"{_liger()}: its fused linear cross-entropy is a Triton kernel that returns a reduced "
        "loss on a GPU, no log-probabilities on a CPU"
    )


def liger_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logp: Tensor,
    rows: int,
) -> Tensor:
    """Liger-kernel's chunked GRPO loss, which is plain torch and therefore runs on a CPU.

    Each row is given as a sequence of one token, ``rows`` of them a chunk: nothing is padded, and
    its "dapo" normalisation is the mean over tokens.

    Raises:
        UnavailableError: liger-kernel is not installed, or too old for per-token chunks.
    """
    _liger()
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as error:
        raise UnavailableError(f"{_liger()} cannot be imported here: {error}") from error
    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=rows, loss_type="dapo"
    )
    loss, _ = module(
        hidden[:, None],
        weight,
        targets[:, None],
        torch.ones_like(targets[:, None]),
        advantages,
        old_per_token_logps=old_logp[:, None],
    )
    return loss


def _liger() -> str:
    """Name and version of liger-kernel, or UnavailableError."""
    try:
        return f"liger-kernel {version('liger-kernel')}"
    except PackageNotFoundError:
        raise UnavailableError("liger-kernel is not installed") from None
