"""airl_fast: learn reasoning rewards from expert demonstrations by adversarial inverse RL, fast.

Each public name lives in the file that bears its name; it is imported when first used, so that
``import airl_fast`` costs little beyond ``import torch``.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

if find_spec("airl_fast._C") is None:
    raise ImportError(
        f"expected airl_fast._C, the compiled part, in {Path(__file__).parent}, found none: this "
        "source tree hides the installed package; run from another folder, or install the tree "
        "itself (pip install -e .)"
    )

_HOME = {
    # operators
    "linear_logprob": "ops.linear_logprob",
    "linear_policy_loss": "ops.linear_policy_loss",
    "PolicyLossStats": "ops.linear_policy_loss",
    "vocab_parallel_linear_logprob": "ops.vocab_parallel",
    "airl_score": "ops.airl_score",
    "AIRLScore": "ops.airl_score",
    "discriminator_loss": "ops.discriminator_loss",
    "DiscriminatorStats": "ops.discriminator_loss",
    "segment_sum": "ops.segments",
    "segment_mean": "ops.segments",
    "segment_last": "ops.segments",
    "segment_softmax": "ops.segments",
    "discounted_returns": "ops.returns",
    "group_advantages": "ops.group_advantages",
    "backend": "ops.dispatch",
    "explain": "ops.dispatch",
    # batches
    "PackedBatch": "packing",
    "Source": "packing",
    "Trace": "packing",
    "pack": "packing",
    # models, training, scoring
    "Policy": "policy",
    "Discriminator": "discriminator",
    "RewardScorer": "scorer",
    "Trainer": "trainer",
    "RunConfig": "config",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'airl_fast' has no attribute {name!r}")
    value = getattr(import_module(f"airl_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
