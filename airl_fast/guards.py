"""What stops a run, or is said of it: values that are not finite, and the states of watches.py.

The checks read nothing from a device that is not read anyway: the operators refuse values that are
not finite, the optimiser reads the gradient's norm, the metrics hold the mean of the rewards. Only
when something is wrong is it looked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from airl_fast.config import RunConfig
from airl_fast.discriminator import Discriminator
from airl_fast.faults import Batch, Fault, load_fault, save_fault
from airl_fast.ops._finite import NonFiniteValueError
from airl_fast.optimisation import NonFiniteGradientError
from airl_fast.packing import Trace
from airl_fast.passes import action_logp, span_energies
from airl_fast.policy import Policy
from airl_fast.watches import GuardError, Watches

__all__ = ["Fault", "GuardError", "Guards", "NonFiniteError", "load_fault"]

_log = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """A loss, reward or gradient that is not finite stopped the run.

    Attributes:
        folder: where the batch is, for ``load_fault``.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


class Guards:
    """The guards of one run.

    Args:
        config: the run's.
        folder: the run's; a batch at fault goes to ``faults/`` in it.
        policy: whose gradients are dropped with a step that is skipped.
        discriminator: likewise; None for a baseline.
        demonstrated_length: mean length of the demonstrations, in tokens; None without any.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        policy: Policy,
        discriminator: Discriminator | None,
        demonstrated_length: float | None,
    ) -> None:
        self.config = config.guards
        self.run = config.run
        self.temperature = config.sampling.temperature
        self.folder = folder
        self.policy = policy
        self.discriminator = discriminator
        self.watches = Watches(config, demonstrated_length, policy.head.weight.dtype)
        self.batch = Batch()
        self.skipped = 0  # steps of the whole run
        self.in_a_row = 0

    def step(
        self, make: Callable[[int], dict[str, float]], step: int, phase: str
    ) -> dict[str, float]:
        """Make a step (``step`` are done before it); return its metrics and the guards'.

        A step that is skipped has ``guards/skipped`` alone. What it had already updated, without
        fault, stays.

        Raises:
            NonFiniteError: a value is not finite and is not, or not again, to be skipped. The
                update that it went into has not been made.
            GuardError: a watched state is entered that the configuration stops at.
        """
        self.batch = Batch()
        try:
            metrics = make(step)
        except (NonFiniteValueError, NonFiniteGradientError) as error:
            self._fault(error, step + 1, phase)
        else:
            self.in_a_row = 0
            metrics |= self.watches.look(step + 1, phase, metrics)
            if self.config.non_finite == "stop":
                return metrics
            return metrics | {"guards/skipped": float(self.skipped)}
        return {"guards/skipped": float(self.skipped)}

    def saw(self, traces: Sequence[Trace], logp: Sequence[Tensor] | None = None) -> None:
        """Note the traces of the step, and their log-probs."""
        self.batch = Batch(traces=traces, logp=logp)

    def rewards(self, rewards: Tensor, mean: float) -> None:
        """Note and check the rewards of the spans of the first traces, [S].

        Args:
            rewards: before any clipping.
            mean: theirs, which is finite only if they are, and has been read anyway.

        Raises:
            NonFiniteValueError: one is not finite.
        """
        spans, lengths = len(rewards), []
        for trace in self.batch.traces:
            if spans > 0:
                lengths.append(len(trace.span_lengths))
                spans -= lengths[-1]
        self.batch.rewards = rewards.split(lengths)
        if not math.isfinite(mean) and not bool(rewards.isfinite().all()):
            raise NonFiniteValueError(f"the mean reward is {mean}: expected finite rewards")

    def advantages(self, advantages: Sequence[Tensor]) -> None:
        """Note the advantages of the actions of the first traces; the loss checks them."""
        self.batch.advantages = advantages

    def state(self) -> dict[str, Any]:
        """JSON-able contents."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "watches": self.watches.state(),
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Set what ``state`` gave; None: the run was begun before there were guards."""
        if state is not None:
            self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
            self.watches.restore(state["watches"])

    def _fault(
        self, error: NonFiniteValueError | NonFiniteGradientError, step: int, phase: str
    ) -> None:
        """Drop the gradients, keep the batch; raise unless the step is to be skipped."""
        for model in (self.policy, self.discriminator):
            if model is not None:
                model.zero_grad(set_to_none=True)
        report = self._report(error, step, phase)
        folder = self.folder / "faults" / f"step-{step:06d}"
        kept = self.policy.world.first_does(partial(self._keep, folder, report))
        self.skipped += 1
        self.in_a_row += 1
        text = f"guard non_finite: step {step} ({phase}), update of the {report['update']}: "
        text += f"{_where(report)}{error}; {kept}"
        if self.config.non_finite == "stop":
            text += "; that update was not made. guards.non_finite=skip leaves such steps out"
            raise NonFiniteError(text, folder) from error
        if self.in_a_row > self.config.max_skips:
            text += f"; {self.in_a_row} steps in a row, more than guards.max_skips"
            raise NonFiniteError(f"{text}={self.config.max_skips}", folder) from error
        if self.policy.world.first:
            _log.warning("%s; skipped (%d in a row)", text, self.in_a_row)

    def _keep(self, folder: Path, report: dict[str, Any]) -> str:
        """Write the batch; say where it is."""
        try:
            save_fault(folder, report, self.batch)
        except OSError as failure:  # a full disk must not hide what was wrong
            return f"the batch could not be written to {folder}: {failure}"
        return f"the batch is in {folder} (airl_fast.guards.load_fault)"

    def _report(
        self, error: NonFiniteValueError | NonFiniteGradientError, step: int, phase: str
    ) -> dict[str, Any]:
        nothing = dict.fromkeys(("tensor", "trace", "position", "value", "parameter"))
        report = {"step": step, "phase": phase, "update": self._update(phase)}
        report |= {"error": str(error), **nothing}
        found: tuple[str, int, int | None, str | None] | None = self.batch.first_non_finite()
        if isinstance(error, NonFiniteGradientError):
            report |= {"tensor": "gradient", "parameter": error.parameter}
        elif found is None:
            found = self._recompute()
        if found is not None:
            tensor, trace, position, value = found
            report |= {"tensor": tensor, "trace": trace, "position": position, "value": value}
        return report

    def _update(self, phase: str) -> str:
        if phase == "sft" or self.batch.rewards is not None:
            return "policy"
        return "discriminator" if self.discriminator is not None else "policy"

    def _recompute(self) -> tuple[str, int, int | None, str | None] | None:
        """The first trace whose log pi or f, alone, is not finite: slow, and only when needed."""
        budget, policy, discriminator = self.run.token_budget, self.policy, self.discriminator
        passes: dict[str, Callable[[Trace], list[Tensor]]] = {
            "logp": lambda trace: action_logp(policy, [trace], budget, self.temperature)
        }
        if discriminator is not None:
            passes["f"] = lambda trace: span_energies(discriminator, policy, [trace], budget)
        for name, values in passes.items():
            for i, trace in enumerate(self.batch.traces):
                try:
                    bad = (~values(trace)[0].isfinite()).nonzero()
                except NonFiniteValueError:  # refused by the operator, whose message is reported
                    return name, i, None, None
                if len(bad):
                    return name, i, int(bad[0]), "not finite"
        return None


def _where(report: Mapping[str, Any]) -> str:
    if report["trace"] is None:
        return ""
    position = "" if report["position"] is None else f"[{report['position']}]"
    value = report["value"] or "not finite"
    return f"{report['tensor']}{position} of trace {report['trace']} is {value}; "
