"""``airl-fast demo``: from imperfect demonstrations to a learned reward, on ``arithmetic``.

A small base model that errs systematically, 600 demonstrations of which 30% are wrong, and 3,000
prompts without any. Every method starts from the same SFT and is measured on the same held-out
problems; whatever is chosen (checkpoint, temperature) is chosen on validation problems. Stopped by
a signal, it goes on when it is started again with the same settings.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any

from airl_fast import demo_jobs
from airl_fast.config import RunConfig, load_config
from airl_fast.durable import whole_folder
from airl_fast.runs_progress import RunsProgress

TEMPERATURES = (1.0, 0.7, 0.5, 0.3, 0.0)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How much the demo does. ``overrides`` go to every run's configuration."""

    seed: int = 0
    sft_arms: tuple[tuple[float, int], ...] = ((2e-4, 240), (1e-3, 700))  # learning rate, steps
    sft_checkpoints: int = 6
    samples: int = 8  # of each test problem, for pass@1
    rerank_samples: int = 16
    overrides: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Measured:
    """One policy on the test problems: per-problem accuracy at temperature 1, greedy, and best."""

    sampled: list[float]
    greedy: list[float]
    best: list[float]
    temperature: float  # chosen on validation


# Accuracy of each way to rerank, hits of each way to locate, the chance of a hit, some traces
Uses = tuple[dict[str, list[float]], dict[str, list[float]], float, list[dict[str, Any]]]


@dataclass(frozen=True)
class Results:
    """Everything that the table and the report are made from; lists are per test problem."""

    settings: dict[str, Any]
    methods: dict[str, Measured]
    chosen: dict[str, str]  # which SFT checkpoints were taken
    rerank: dict[str, list[float]]
    locate: dict[str, list[float]]
    locate_chance: float
    traces: list[dict[str, Any]]
    seconds: float


def run_demo(output_dir: Path, settings: DemoSettings | None = None) -> Results:
    """Run the demo and write metrics.json, report.html, policy/ and reward/ to ``output_dir``.

    Args:
        output_dir: a new or empty folder, or that of a demo with the same settings that did not
            come to its end.
        settings: seed and sizes.

    Raises:
        ValueError: the folder holds something else.
        demo_jobs.StoppedError: SIGTERM or Ctrl-C; every run has saved its step.
    """
    from airl_fast.demo_report import print_results, write_results

    settings = settings or DemoSettings()
    demo_jobs.open_folder(output_dir, asdict(settings))
    started = time.perf_counter()
    workers = min(2, cpu_count() or 1)
    with demo_jobs.pool(workers) as pool, RunsProgress() as bars:
        start, sampled, methods, uses = _run_jobs(pool, bars, output_dir, settings)
    rerank, locate, chance, traces = uses
    results = Results(
        settings={**asdict(settings), "workers": workers},
        methods=methods,
        chosen={"SFT": start, _SAMPLED: sampled},
        rerank=rerank,
        locate=locate,
        locate_chance=chance,
        traces=traces,
        seconds=time.perf_counter() - started,
    )
    curves = {name: output_dir / folder for name, (folder, *_) in _METHODS.items()}
    write_results(output_dir, results, curves)
    print_results(results, output_dir)
    return results


def _run_jobs(
    pool: ProcessPoolExecutor, bars: RunsProgress, output_dir: Path, settings: DemoSettings
) -> tuple[str, str, dict[str, Measured], Uses]:
    """The two SFT checkpoints taken, every policy measured, and what the reward is good for."""
    arms = [
        bars.follow(f"SFT {rate:g}", config, pool.submit(_sft, config))
        for rate, steps in settings.sft_arms
        for config in [_sft_config(output_dir, settings, rate, steps)]
    ]
    jobs = {"base": bars.wait("base, measured", pool.submit(_measure, settings, _BASE))}
    start, sampled = _choose_sft(output_dir, [arm.result() for arm in arms])
    for name in _METHODS:
        config = _method_config(output_dir, settings, name, start)
        jobs[name] = bars.follow(name, config, pool.submit(_improve, settings, config))
    for name, model in {"SFT": start, _SAMPLED: sampled}.items():
        jobs[name] = bars.wait(f"{name}, measured", pool.submit(_measure, settings, model))
    jobs["AIRL"].result()
    for part in ("policy", "reward"):
        with whole_folder(output_dir / part) as made:
            shutil.copytree(output_dir / "airl" / part, made, dirs_exist_ok=True)
    job = pool.submit(_use_reward, settings, start, str(output_dir))
    uses = bars.wait("reranking and locating", job)
    order = ("base", "SFT", _SAMPLED, *_METHODS)
    return start, sampled, {name: jobs[name].result() for name in order}, uses.result()


# Jobs: each runs in a worker process on one thread

_BASE = "arithmetic-base"
_SAMPLED = "SFT chosen at T = 1"
_METHODS: dict[str, tuple[str, ...]] = {  # name: folder, and how it differs from the recipe
    "AIRL": ("airl",),
    "AIRL, f frozen": ("frozen", "algorithm.frozen_discriminator=true"),
    "GRPO, true outcome": ("grpo", "algorithm.name=grpo"),
}


def _config(folder: Path, settings: DemoSettings, *overrides: str) -> RunConfig:
    own = (
        f"run.output_dir={folder}",
        f"run.seed={settings.seed}",
        f"task.seed={settings.seed}",
        "run.threads=1",
        "run.eval_every=10",
        "run.eval_samples=2",
        "algorithm.sft_warmup=0",
    )
    return load_config("arithmetic", [*own, *overrides, *settings.overrides])


def _sft_config(output_dir: Path, settings: DemoSettings, rate: float, steps: int) -> RunConfig:
    return _config(
        output_dir / f"sft-{rate:g}",
        settings,
        "algorithm.name=sft",
        "run.eval_every=0",
        f"algorithm.sft_learning_rate={rate}",
        f"run.steps={steps}",
        f"run.checkpoint_every={max(1, steps // settings.sft_checkpoints)}",
        "run.keep_checkpoints=1000",  # all: a demo that was stopped has more than its candidates
    )


def _method_config(output_dir: Path, settings: DemoSettings, name: str, start: str) -> RunConfig:
    folder, *variant = _METHODS[name]
    return _config(output_dir / folder, settings, f"policy.model={start}", *variant)


def _sft(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Train one arm; accuracy of each checkpoint on validation, sampled and greedy."""
    from airl_fast.checkpoint import load_checkpoint
    from airl_fast.learners import copy_parameters

    trainer = demo_jobs.train(config)
    total, every = config.total_steps, config.run.checkpoint_every
    scores = {}
    for step in [*range(every, total, every), total]:
        demo_jobs.check()
        path = trainer.folder.path / "checkpoints" / f"step-{step:06d}"
        copy_parameters(trainer.policy.trainable(), load_checkpoint(path)[0], "policy.")
        folder = trainer.folder.path / path.name
        trainer.policy.save(folder)
        sampled, greedy = (
            _accuracy(trainer.policy, config, "validation", n, t) for t, n in ((1.0, 4), (0.0, 1))
        )
        scores[str(folder)] = (_mean(sampled), _mean(greedy))
    return scores


def _choose_sft(
    output_dir: Path, arms: Sequence[dict[str, tuple[float, float]]]
) -> tuple[str, str]:
    """The best checkpoint by greedy decoding, and the best sampled at T = 1, on validation.

    The first is where every method starts. The second has seen the demonstrations until it writes
    one trace a prompt: it samples better, and there is little left to learn from its samples.
    """
    scores = {folder: score for arm in arms for folder, score in arm.items()}
    (output_dir / "sft.json").write_text(json.dumps(scores, indent=2))
    return max(scores, key=lambda f: scores[f][1]), max(scores, key=lambda f: scores[f][0])


def _improve(settings: DemoSettings, config: RunConfig) -> Measured:
    """Train one method from the SFT, and measure it."""
    trainer = demo_jobs.train(config)
    return _measure(settings, str(trainer.folder.policy))


def _measure(settings: DemoSettings, model: str) -> Measured:
    """Choose a temperature on validation; measure on the test problems."""
    from airl_fast.models import Policy

    policy = Policy.from_pretrained(model)
    config = _config(Path(), settings)
    sweep = {
        t: _mean(_accuracy(policy, config, "validation", 4 if t else 1, t)) for t in TEMPERATURES
    }
    best = max(sweep, key=lambda t: sweep[t])
    test = {
        t: _accuracy(policy, config, "test", settings.samples if t else 1, t)
        for t in {1.0, 0.0, best}
    }
    return Measured(test[1.0], test[0.0], test[best], best)


def _accuracy(
    policy: Any, config: RunConfig, split: str, samples: int, temperature: float
) -> list[float]:
    """Share of right answers to each problem of a split."""
    demo_jobs.check()
    drawn = _draw(policy, config, split, samples, temperature)
    return drawn.correct.double().mean(1).tolist()


def _draw(policy: Any, config: RunConfig, split: str, samples: int, temperature: float) -> Any:
    from airl_fast.batches import encode
    from airl_fast.tasks import load_task
    from airl_fast.validation import sample_problems

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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _use_reward(settings: DemoSettings, start: str, output_dir: str) -> Uses:
    """Rerank the SFT's samples and locate planted errors, by f and by log pi alone."""
    from airl_fast.demo_reward import locate, rerank, show_traces
    from airl_fast.models import Discriminator, Policy
    from airl_fast.tasks import load_task

    policy = Policy.from_pretrained(start)
    reward = Discriminator.from_pretrained(Path(output_dir) / "reward")
    config = _config(Path(), settings)
    samples = _draw(policy, config, "test", settings.rerank_samples, 1.0)
    task = load_task(config.task)
    ranked = rerank(reward, policy, task, samples, config)
    located, chance, planted = locate(reward, policy, task, config)
    return ranked, located, chance, show_traces(planted)
