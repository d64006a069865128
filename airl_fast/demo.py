"""``airl-fast demo``: from imperfect demonstrations to a learned reward, on ``arithmetic``.

A small base model that errs systematically, 150 demonstrations of which half are wrong, and 3,000
prompts without any. AIRL and the controls start from the base, SFT and a control from it have the
same demonstrations; all are measured on the same held-out problems, and whatever is chosen
(checkpoint, temperature) is chosen on validation problems. Stopped by a signal, it goes on when it
is started again with the same settings.
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

from airl_fast import jobs
from airl_fast.config import RunConfig, load_config
from airl_fast.durable import whole_folder
from airl_fast.measuring import Measured, choose_sft, measure, sft_overrides, train_sft
from airl_fast.reward_uses import Uses, use_reward
from airl_fast.runs_progress import RunsProgress

TEMPERATURES = (1.0, 0.7, 0.5, 0.3, 0.0)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How much the demo does. ``overrides`` go to every run's configuration."""

    seed: int = 0
    sft_arms: tuple[tuple[float, int], ...] = ((5e-5, 240), (2e-4, 240), (1e-3, 700))  # rate, steps
    sft_checkpoints: int = 6
    samples: int = 8  # of each test problem, for pass@1
    rerank_samples: int = 16
    overrides: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Results:
    """Everything that the table and the report are made from; lists are per test problem."""

    settings: dict[str, Any]
    methods: dict[str, Measured]
    chosen: dict[str, str]  # which SFT checkpoints were taken
    uses: Uses  # of the learned reward, on samples of the base
    seconds: float


def run_demo(output_dir: Path, settings: DemoSettings | None = None) -> Results:
    """Run the demo and write metrics.json, report.html, policy/ and reward/ to ``output_dir``.

    Args:
        output_dir: a new or empty folder, or that of a demo with the same settings that did not
            come to its end.
        settings: seed and sizes.

    Raises:
        ValueError: the folder holds something else.
        jobs.StoppedError: SIGTERM or Ctrl-C; every run has saved its step.
    """
    from airl_fast.demo_report import print_results, write_results

    settings = settings or DemoSettings()
    if (output_dir / "metrics.json").exists():
        raise ValueError(
            f"{output_dir} holds a finished demo: choose another --output-dir or delete it"
        )
    jobs.open_folder(output_dir, asdict(settings), "demo")
    started = time.perf_counter()
    workers = min(2, cpu_count() or 1)
    with jobs.pool(workers) as pool, RunsProgress() as bars:
        start, sampled, methods, uses = _run_jobs(pool, bars, output_dir, settings)
    results = Results(
        settings={**asdict(settings), "workers": workers},
        methods=methods,
        chosen={"SFT": start, _SAMPLED: sampled},
        uses=uses,
        seconds=time.perf_counter() - started,
    )
    curves = {name: output_dir / method.folder for name, method in _METHODS.items()}
    write_results(output_dir, results, curves)
    print_results(results, output_dir)
    return results


def _run_jobs(
    pool: ProcessPoolExecutor, bars: RunsProgress, output_dir: Path, settings: DemoSettings
) -> tuple[str, str, dict[str, Measured], Uses]:
    """The two SFT checkpoints taken, every policy measured, what the reward is good for."""
    arms = [
        bars.follow(f"SFT {rate:g}", config, pool.submit(train_sft, config))
        for rate, steps in settings.sft_arms
        for config in [_sft_config(output_dir, settings, rate, steps)]
    ]
    done = {"base": bars.wait("base, measured", pool.submit(_measure, settings, _BASE))}

    def improve(names: Sequence[str], start: str) -> None:
        for name in names:
            config = _method_config(output_dir, settings, name, start)
            done[name] = bars.follow(name, config, pool.submit(_improve, settings, config))

    improve([name for name, method in _METHODS.items() if not method.from_sft], _BASE)
    start, sampled = _choose_sft(output_dir, [arm.result() for arm in arms])
    improve([name for name, method in _METHODS.items() if method.from_sft], start)
    for name, model in {"SFT": start, _SAMPLED: sampled}.items():
        done[name] = bars.wait(f"{name}, measured", pool.submit(_measure, settings, model))
    done[AIRL].result()
    learned = output_dir / _METHODS[AIRL].folder
    job = pool.submit(_use_reward, settings, _BASE, learned / "reward")
    uses = bars.wait("reranking and locating", job)
    for part in ("policy", "reward"):
        with whole_folder(output_dir / part) as made:
            shutil.copytree(learned / part, made, dirs_exist_ok=True)
    order = ("base", *_METHODS, "SFT", _SAMPLED)
    found: Uses = uses.result()
    return start, sampled, {name: done[name].result() for name in order}, found


# Jobs: each runs in a worker process on one thread

_BASE = "arithmetic-base"
_SAMPLED = "SFT chosen at T = 1"
AIRL, FROZEN, GRPO = "AIRL", "AIRL, f frozen", "GRPO, true outcome"
SHARPENED = "SFT, then its log pi as the reward"


@dataclass(frozen=True)
class _Method:
    folder: str
    overrides: tuple[str, ...] = ()  # how it differs from the recipe
    from_sft: bool = False  # rather than from the base


_FREEZE = "algorithm.frozen_discriminator=true"
_METHODS = {
    AIRL: _Method("airl"),
    FROZEN: _Method("frozen", (_FREEZE,)),
    GRPO: _Method("grpo", ("algorithm.name=grpo",)),
    SHARPENED: _Method("sharpened", (_FREEZE, "algorithm.reward=f"), from_sft=True),
}


def _config(folder: Path, settings: DemoSettings, *overrides: str) -> RunConfig:
    own = (
        f"run.output_dir={folder}",
        f"run.seed={settings.seed}",
        f"task.seed={settings.seed}",
        "run.threads=1",
        "run.eval_every=15",
        "run.eval_samples=2",
        "algorithm.sft_warmup=0",
    )
    return load_config("arithmetic", [*own, *overrides, *settings.overrides])


def _sft_config(output_dir: Path, settings: DemoSettings, rate: float, steps: int) -> RunConfig:
    arm = sft_overrides(rate, steps, settings.sft_checkpoints)
    return _config(output_dir / f"sft-{rate:g}", settings, *arm)


def _method_config(output_dir: Path, settings: DemoSettings, name: str, start: str) -> RunConfig:
    method = _METHODS[name]
    model = f"policy.model={start}"
    return _config(output_dir / method.folder, settings, model, *method.overrides)


def _choose_sft(
    output_dir: Path, arms: Sequence[dict[str, tuple[float, float]]]
) -> tuple[str, str]:
    """The best SFT decoded greedily, and the one chosen at T = 1."""
    scores = {folder: score for arm in arms for folder, score in arm.items()}
    (output_dir / "sft.json").write_text(json.dumps(scores, indent=2))
    return choose_sft(scores)


def _improve(settings: DemoSettings, config: RunConfig) -> Measured:
    """Train one method from its start, and measure it."""
    trainer = jobs.train(config)
    return _measure(settings, str(trainer.folder.policy))


def _measure(settings: DemoSettings, model: str) -> Measured:
    config = _config(Path(), settings)
    return measure(model, config, temperatures=TEMPERATURES, samples=settings.samples)


def _use_reward(settings: DemoSettings, start: str, reward: Path) -> Uses:
    config = _config(Path(), settings)
    return use_reward(reward, start, config, samples=settings.rerank_samples)
