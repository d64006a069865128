"""What a step starts from, and what is kept of it: models, learners, traces, results."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from airl_fast.config import RunConfig, load_config
from airl_fast.discriminator import Discriminator
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.learners import DiscriminatorLearner, PolicyLearner
from airl_fast.optimisation import Optimiser
from airl_fast.packing import Trace
from benchmarks.harness import Outputs
from benchmarks.language import ModelShape, StepTraces, random_model, step_traces

# Of a pass, the fastest of those tried: budgets of 700, 1,300 and 2,560 tokens took 38.5, 33.9 and
# 37.3 s a step (2 prompts, G = 8, two cores of an EPYC). One prompt fits, with 9 completions.
TOKEN_BUDGET = 1408
SAMPLES = 64  # entries of a parameter's gradient that are checked on the timed inputs
_RECIPE = "gsm8k-smollm2"
_OVERRIDES = (  # two models of full weights, as the recipe's defaults would have them
    "policy.lora_rank=0",
    "discriminator.lora_rank=0",
    "discriminator.trunk=own",
    f"run.token_budget={TOKEN_BUDGET}",
)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Both models with their learners; every formulation trains the same ones, from ``start``.

    Attributes:
        traces: what the step sees.
        config: its hyper-parameters.
        policy, discriminator: float32, or float64 for the oracle.
        disc_learner, policy_learner: hold the optimisers, which the peers use, too.
        samples: entries of a parameter's gradient that are kept.
        start: the weights that a step starts from.
    """

    traces: StepTraces
    config: RunConfig
    policy: LanguageModel
    discriminator: Discriminator
    disc_learner: DiscriminatorLearner
    policy_learner: PolicyLearner
    samples: int
    start: dict[str, Tensor] = field(default_factory=dict)

    @property
    def everything(self) -> list[Trace]:
        """What the discriminator tells apart: the samples, then the demonstrations."""
        return [*self.traces.policy, *self.traces.experts]

    def weights(self) -> dict[str, Tensor]:
        """All parameters of both models."""
        return {
            **{f"policy {k}": p for k, p in self.policy.trainable().items()},
            **{f"discriminator {k}": p for k, p in self.discriminator.trainable().items()},
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Undo the steps made: weights, optimisers, running accuracy."""
        for name, weight in self.weights().items():
            weight.copy_(self.start[name])
        self.disc_learner.accuracy = 0.5
        for learner in (self.disc_learner, self.policy_learner):
            learner.optimiser.updates = 0
            for state in learner.optimiser.adamw.state.values():
                for value in state.values():
                    value.zero_()

    def copy(self, dtype: torch.dtype) -> "StepInputs":
        """A copy in float64 or float32, as what is right."""
        policy, discriminator = (deepcopy(x).to(dtype) for x in (self.policy, self.discriminator))
        return _assembled(self.traces, self.config, policy, discriminator, self.samples)


def step_inputs(
    prompts: int,
    group: int,
    shape: ModelShape,
    seed: int,
    samples: int = SAMPLES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> StepInputs:
    """Random models of this shape, f not equal to log pi, and the traces of ``prompts`` prompts."""
    policy, energy = (
        LanguageModel(random_model(shape, seed + i), None, Origin(model="random")) for i in (0, 1)
    )
    config = load_config(_RECIPE, _OVERRIDES)
    learned = config.discriminator
    discriminator = Discriminator(
        energy,
        head=learned.head,
        trunk=learned.trunk,
        width=shape.hidden,
        span_logp=learned.span_logp,
        kappa=learned.kappa,
        offset=learned.offset,
    )
    traces = step_traces(prompts, group, shape.vocab, seed)
    return _assembled(
        traces, config, policy.to(device, dtype), discriminator.to(device, dtype), samples
    )


def _assembled(
    traces: StepTraces,
    config: RunConfig,
    policy: LanguageModel,
    discriminator: Discriminator,
    samples: int,
) -> StepInputs:
    options = config.policy
    optimiser = Optimiser(
        policy.trainable(),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=options.betas,
        clip_norm=options.clip_norm,
        warmup=options.warmup_steps,
        updates=config.run.steps,
        final_fraction=options.final_lr_fraction,
    )
    inputs = StepInputs(
        traces,
        config,
        policy,
        discriminator,
        DiscriminatorLearner(discriminator, policy, config),
        PolicyLearner(policy, config, optimiser),
        samples,
    )
    inputs.start.update({name: w.detach().clone() for name, w in inputs.weights().items()})
    return inputs


@dataclass(frozen=True)
class StepResult:
    """What a formulation returns: tensors in its own layout, and the seconds of each part."""

    outputs: Outputs
    seconds: dict[str, float]


class Laps:
    """Seconds of the parts of a step, which come one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def add(self, part: str) -> None:
        """Count the time since the last call as this part's."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


@contextmanager
def kept_gradients(optimiser: Optimiser, samples: int) -> Iterator[list[Tensor]]:
    """Inside the block, every update leaves entries of its (clipped) gradients in the list."""
    found: list[Tensor] = []

    def keep(*_: Any) -> None:
        for parameter in optimiser.wide.updated:
            assert parameter.grad is not None
            stride = max(1, parameter.numel() // samples)
            found.append(parameter.grad.flatten()[::stride].clone())

    handle = optimiser.adamw.register_step_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
