"""How good a policy is on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from airl_fast.batches import Problem, TraceMaker, derive_seed
from airl_fast.config import RunConfig
from airl_fast.discriminator import Discriminator
from airl_fast.evaluation import auc
from airl_fast.language_model import LanguageModel
from airl_fast.packing import Source, Trace
from airl_fast.passes import per_trace_sum, span_energies
from airl_fast.rollout import Rollout, sample
from airl_fast.tasks import Task
from airl_fast.training_data import TrainingData


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Completions of held-out problems: ``group_size`` of each, adjacent."""

    problems: Sequence[Problem]
    rollouts: list[Rollout]
    correct: torch.Tensor  # [P, group_size] bool

    @property
    def accuracy(self) -> float:
        """pass@1: the mean over all samples."""
        return self.correct.double().mean().item()


def sample_problems(
    policy: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
) -> Samples:
    """Sample completions of every problem and check them with the task's verifier."""
    rollouts = sample(
        policy,
        [problem.prompt for problem in problems],
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        seed=derive_seed(seed, "validation", 0),
        temperature=temperature,
        stop=stop,
    )
    correct = [
        task.is_correct(rollout.text, problems[i // group_size].example)
        for i, rollout in enumerate(rollouts)
    ]
    return Samples(
        problems=problems,
        rollouts=rollouts,
        correct=torch.tensor(correct).view(len(problems), group_size),
    )


def sample_validation(
    config: RunConfig, task: Task, data: TrainingData, policy: LanguageModel
) -> Samples:
    """Completions of a run's validation problems: from the same seed whenever it is called."""
    return sample_problems(
        policy,
        task,
        data.validation,
        group_size=config.run.eval_samples,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.run.seed,
        temperature=config.sampling.temperature,
        stop=config.sampling.stop,
    )


def validate(
    samples: Samples,
    traces: Sequence[Trace],
    policy: LanguageModel,
    discriminator: Discriminator | None,
    token_budget: int,
) -> dict[str, float]:
    """pass@1 of the samples, f there and how well it tells right from wrong.

    Args:
        samples: of validation problems.
        traces: the same, of ``traces_of``.
        policy: sampled them; a discriminator may read its states.
        discriminator: gives f, if there is one.
        token_budget: of one pass.
    """
    metrics = {"valid/pass@1": samples.accuracy}
    if discriminator is not None:
        energies = span_energies(discriminator, policy, traces, token_budget)
        score, right = per_trace_sum(energies).cpu(), samples.correct.flatten()
        metrics["valid/f"] = score.mean().item()
        if right.any() and not right.all():
            metrics["valid/auc_f"] = auc(score.numpy(), right.numpy())
    return metrics


def traces_of(samples: Samples, maker: TraceMaker) -> list[Trace]:
    """The samples as traces, grouped by problem."""
    size = samples.correct.shape[1]
    return [
        maker.trace(samples.problems[i // size], rollout.completion, Source.POLICY, i // size)
        for i, rollout in enumerate(samples.rollouts)
    ]


def outcome_rewards(
    policy: LanguageModel, task: Task, problems: Sequence[Problem], traces: Sequence[Trace]
) -> torch.Tensor:
    """One for a right answer, credited at the trace's last span, zero elsewhere, [S].

    Args:
        policy: decodes.
        task: verifies.
        problems: what each trace answers.
        traces: completions.
    """
    rewards: list[float] = []
    for problem, trace in zip(problems, traces, strict=True):
        text = policy.tokenizer.decode(trace.completion, skip_special_tokens=True)
        right = task.is_correct(text, problem.example)
        rewards += [0.0] * (len(trace.span_lengths) - 1) + [float(right)]
    return torch.tensor(rewards, device=policy.device)
