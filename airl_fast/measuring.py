"""Policies measured on held-out problems, and SFT checkpoints chosen on validation problems."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from airl_fast import jobs
from airl_fast.batches import encode
from airl_fast.building import load_measured
from airl_fast.checkpoint import load_checkpoint
from airl_fast.config import RunConfig
from airl_fast.language_model import LanguageModel
from airl_fast.tasks import load_task
from airl_fast.validation import Samples, sample_problems
from airl_fast.weights import copy_parameters

VALIDATION_SAMPLES = 4  # of a validation problem, at each temperature above 0
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Measured:
    """One policy on the test problems: per-problem accuracy at temperature 1, greedy, and best."""

    sampled: list[float]
    greedy: list[float]
    best: list[float]
    temperature: float  # chosen on validation
    validation: dict[str, float] = field(default_factory=dict)  # accuracy by temperature


def measure(
    model: str | Path, config: RunConfig, *, temperatures: Sequence[float], samples: int
) -> Measured:
    """Choose a temperature on validation problems; measure on test problems.

    Args:
        model: folder or name of a policy.
        config: of its run: task, lengths and seed.
        temperatures: to choose from; 0 is greedy decoding.
        samples: of each test problem, at each temperature above 0.
    """
    policy = load_measured(model, config)
    sweep = {
        t: mean(accuracy(policy, config, "validation", VALIDATION_SAMPLES if t else 1, t))
        for t in temperatures
    }
    best = max(sweep, key=lambda t: sweep[t])
    test = {t: accuracy(policy, config, "test", samples if t else 1, t) for t in {1.0, 0.0, best}}
    by_text = {f"{t:g}": value for t, value in sweep.items()}
    return Measured(test[1.0], test[0.0], test[best], best, by_text)


def accuracy(
    policy: LanguageModel, config: RunConfig, split: Split, samples: int, temperature: float
) -> list[float]:
    """Share of right answers to each problem of a split."""
    drawn = draw(policy, config, split, samples, temperature)
    return drawn.correct.double().mean(1).tolist()


def draw(
    policy: LanguageModel, config: RunConfig, split: Split, samples: int, temperature: float
) -> Samples:
    """Completions of every problem of a split, verified."""
    jobs.check()
    task = load_task(config.task)
    return sample_problems(
        policy,
        task,
        encode(getattr(task, split), policy.tokenizer),
        group_size=samples,
        max_new_tokens=config.sampling.max_new_tokens,
        seed=config.run.seed,
        temperature=temperature,
    )


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def sft_overrides(rate: float, steps: int, checkpoints: int) -> tuple[str, ...]:
    """What makes a run an SFT arm of ``train_sft``: annealed, with checkpoints along the way."""
    return (
        "algorithm.name=sft",
        "run.eval_every=0",
        f"algorithm.sft_learning_rate={rate}",
        "policy.final_lr_fraction=0.1",
        f"run.steps={steps}",
        f"run.checkpoint_every={max(1, steps // checkpoints)}",
        "run.keep_checkpoints=1000",  # all: one that was stopped has more than its candidates
    )


def train_sft(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Train one arm of SFT and write every checkpoint as a policy.

    Returns:
        By the policy's folder, its accuracy on validation problems: at temperature 1 and greedy.
    """
    trainer = jobs.train(config)
    total, every = config.total_steps, config.run.checkpoint_every
    scores = {}
    for step in [*range(every, total, every), total]:
        path = trainer.folder.path / "checkpoints" / f"step-{step:06d}"
        copy_parameters(trainer.policy.trainable(), load_checkpoint(path)[0], "policy.")
        folder = trainer.folder.path / path.name
        trainer.policy.save(folder)
        sampled, greedy = (
            mean(accuracy(trainer.policy, config, "validation", n, t))
            for t, n in ((1.0, VALIDATION_SAMPLES), (0.0, 1))
        )
        scores[str(folder)] = (sampled, greedy)
    return scores


def choose_sft(scores: Mapping[str, tuple[float, float]]) -> tuple[str, str]:
    """The best checkpoint by greedy decoding, and the best sampled at T = 1, on validation.

    The second has seen the demonstrations until it writes one trace a prompt: it samples better,
    and there is little left to learn from its samples.
    """
    return max(scores, key=lambda f: scores[f][1]), max(scores, key=lambda f: scores[f][0])


def forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run that is finished and measured."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
