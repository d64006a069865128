"""States that training does not leave by itself, each watched by name in a step's metrics.

A watch looks at metrics that are there anyway. ``patience`` steps in a row put the run into the
state, one good step takes it out; both are said once. A step whose metrics say nothing of a state
(the policy's in a step of the discriminator alone) leaves its watch as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from airl_fast.config import RunConfig

_log = logging.getLogger(__name__)

Finding = tuple[bool, str]  # whether the state holds, and the numbers in words


class GuardError(RuntimeError):
    """A watched state that the configuration stops at.

    Attributes:
        guard: its name.
    """

    def __init__(self, message: str, guard: str) -> None:
        super().__init__(message)
        self.guard = guard


# Largest difference of a token's log-prob, by the precision of products (bfloat16 is medium).
_MISMATCH = {"highest": 0.01, "high": 0.1, "medium": 0.5}


class Watches:
    """The watches of a run.

    Args:
        config: the run's.
        demonstrated_length: mean length of the demonstrations, in tokens; None without any.
        dtype: of the policy's weights.
    """

    def __init__(
        self, config: RunConfig, demonstrated_length: float | None, dtype: torch.dtype
    ) -> None:
        self.config = config.guards
        self.demonstrated_length = demonstrated_length
        precision = "medium" if torch.finfo(dtype).bits < 32 else config.run.matmul_precision
        self.tolerance = self.config.mismatch_tolerance or _MISMATCH[precision or "highest"]
        self.first_entropy: float | None = None
        looks: dict[str, Callable[[Mapping[str, Any]], Finding | None]] = {
            "discriminator_saturated": self._saturated,
            "policy_collapse_entropy": self._entropy,
            "policy_collapse_length": self._length,
            "policy_collapse_repetition": self._repetition,
            "sampler_mismatch": self._mismatch,
        }
        self._looks = {k: look for k, look in looks.items() if getattr(self.config, k) != "off"}
        self._rows = dict.fromkeys(self._looks, 0)  # bad steps in a row
        self._inside = dict.fromkeys(self._looks, False)

    def look(self, step: int, phase: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Look at one finished step; return ``guards/NAME`` of every watch: 1 inside its state.

        Raises:
            GuardError: a state is entered that the configuration stops at.
        """
        if phase == "sft":  # imitation: neither samples nor a discriminator
            return {}
        for name, look in self._looks.items():
            found = look(metrics)
            if found is not None:
                self._update(name, step, *found)
        return {f"guards/{name}": float(inside) for name, inside in self._inside.items()}

    def _update(self, name: str, step: int, holds: bool, numbers: str) -> None:
        self._rows[name] = self._rows[name] + 1 if holds else 0
        if self._inside[name] and not holds:
            self._inside[name] = False
            _log.warning("guard %s: over at step %d: %s", name, step, numbers)
        elif not self._inside[name] and self._rows[name] >= self.config.patience:
            self._inside[name] = True
            text = f"guard {name}: step {step}, {self._rows[name]} in a row: {numbers}; "
            text += _REMEDIES[name]
            if getattr(self.config, name) == "stop":
                raise GuardError(f"{text}; guards.{name}=warn goes on", name)
            _log.warning("%s", text)

    def _saturated(self, metrics: Mapping[str, Any]) -> Finding | None:
        accuracy, logit = metrics.get("disc/accuracy"), metrics.get("disc/logit")
        if accuracy is None or logit is None:
            return None
        least, large = self.config.saturated_accuracy, self.config.saturated_logit
        text = f"disc/accuracy {accuracy:.4f} (from {least}), disc/logit {logit:.3g} (from {large})"
        return accuracy >= least and logit >= large, text

    def _entropy(self, metrics: Mapping[str, Any]) -> Finding | None:
        entropy = metrics.get("policy/entropy")
        if entropy is None:
            return None
        if self.first_entropy is None:
            self.first_entropy = entropy
        least = self.config.entropy_fraction * self.first_entropy
        first = f"{self.first_entropy:.3g} in the first policy step"
        return entropy < least, f"policy/entropy {entropy:.3g} (below {least:.3g}; {first})"

    def _length(self, metrics: Mapping[str, Any]) -> Finding | None:
        if "rollout/length" not in metrics:
            return None
        length, cut = metrics["rollout/length"], metrics["rollout/truncated"]
        least, most = 0.0, self.config.truncated_share
        if self.demonstrated_length is not None:
            least = self.config.length_fraction * self.demonstrated_length
        text = f"rollout/length {length:.4g} (below {least:.4g}), "
        text += f"rollout/truncated {cut:.3f} (from {most})"
        return length < least or cut >= most, text

    def _repetition(self, metrics: Mapping[str, Any]) -> Finding | None:
        distinct = metrics.get("rollout/distinct")
        if distinct is None:
            return None
        least = self.config.distinct_share
        return distinct < least, f"rollout/distinct {distinct:.3f} (below {least})"

    def _mismatch(self, metrics: Mapping[str, Any]) -> Finding | None:
        mismatch = metrics.get("sampler_mismatch")
        if mismatch is None:
            return None
        return not mismatch <= self.tolerance, (
            f"sampler_mismatch {mismatch:.3g} (above {self.tolerance:g})"
        )

    def state(self) -> dict[str, Any]:
        """JSON-able contents."""
        return {"rows": self._rows, "inside": self._inside, "first_entropy": self.first_entropy}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what ``state`` gave; a watch that was off then starts anew."""
        self._rows |= {k: v for k, v in state["rows"].items() if k in self._rows}
        self._inside |= {k: v for k, v in state["inside"].items() if k in self._inside}
        self.first_entropy = state["first_entropy"]


_REMEDIES = {
    "discriminator_saturated": "lower discriminator.learning_rate, raise "
    "discriminator.label_smoothing, or set discriminator.accuracy_throttle",
    "policy_collapse_entropy": "raise algorithm.entropy_coef or algorithm.kl_beta, or lower "
    "policy.learning_rate",
    "policy_collapse_length": "read samples: f may pay for length; set algorithm.kl_beta, or raise "
    "sampling.max_new_tokens if right answers are cut off",
    "policy_collapse_repetition": "read samples; set algorithm.kl_beta, or lower "
    "policy.learning_rate",
    "sampler_mismatch": "the log-probs of sampling and training differ: check that the model is "
    "in eval mode there, its dtype and its attention (docs/guards.md)",
}
