"""What the commands of ``airl-fast`` do with their arguments; each returns the exit status.

They import what they need when they run, so that ``airl-fast --help`` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airl_fast.scorer import RewardScorer


def demo(arguments: argparse.Namespace) -> int:
    """``airl-fast demo``."""
    from airl_fast.demo import DemoSettings, run_demo
    from airl_fast.jobs import StoppedError

    _hush()
    try:
        run_demo(arguments.output_dir, DemoSettings(seed=arguments.seed))
    except StoppedError as stopped:
        print(
            f"airl-fast: {stopped}; the same command goes on from there",
            file=sys.stderr,
        )
        return stopped.status
    return 0


def study(arguments: argparse.Namespace) -> int:
    """``airl-fast study``."""
    from airl_fast.study.spec import description, studies, study_text

    if arguments.study is None:
        for name in studies():
            print(f"{name}\n    {description(study_text(name))}")
        return 0

    from airl_fast.jobs import StoppedError
    from airl_fast.study.runner import run_study

    _hush()
    folder = arguments.output_dir or Path("runs") / f"study-{Path(arguments.study).stem}"
    seeds = {} if arguments.seeds is None else {"seeds": arguments.seeds}
    options = {"workers": arguments.jobs, "page": arguments.page, "overrides": arguments.overrides}
    try:
        failed = run_study(arguments.study, folder, **options, **seeds)
    except StoppedError as stopped:
        print(f"airl-fast: {stopped}; the same command goes on from there", file=sys.stderr)
        return stopped.status
    for cell, why in failed.items():
        print(f"airl-fast: {cell}: {why}", file=sys.stderr)
    return 1 if failed else 0


def train(arguments: argparse.Namespace) -> int:
    """``airl-fast train``."""
    from airl_fast.config import load_config

    config = load_config(arguments.recipe, arguments.overrides)  # before the slow imports

    from rich.console import Console

    from airl_fast.distributed import join, leave
    from airl_fast.progress import TrainingProgress, summary
    from airl_fast.stopping import StopSignals
    from airl_fast.trainer import Trainer

    _hush()
    world = join(config.run.device)
    console = Console(quiet=not world.first)
    folder = Path(config.run.output_dir)
    console.print(f"{config.algorithm.name} on {config.task.name}, in {folder}", highlight=False)
    with TrainingProgress(config.total_steps, console=console) as progress:
        stop = StopSignals()
        trainer = Trainer(config, world=world, on_step=progress, should_stop=stop)
        try:
            with stop:
                history = trainer.train()
                leave(world)
        except KeyboardInterrupt:
            print(
                f"airl-fast: interrupted after step {trainer.step} of {trainer.total_steps}; the "
                "same command goes on from the last checkpoint",
                file=sys.stderr,
            )
            return 130
    console.print(summary(history))
    if trainer.step < trainer.total_steps:
        print(
            f"airl-fast: stopped after step {trainer.step} of {trainer.total_steps} and saved it; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return stop.status
    console.print(f"policy:  {folder / 'policy'}", highlight=False, soft_wrap=True)
    if trainer.discriminator is not None:
        console.print(f"reward:  {folder / 'reward'}", highlight=False, soft_wrap=True)
        console.print(f"use it:  airl-fast score {folder} traces.jsonl", highlight=False)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """``airl-fast export``."""
    from airl_fast.export import export_run

    _hush()
    folder = export_run(arguments.directory, arguments.checkpoint, arguments.output)
    print(folder)
    return 0


def score(arguments: argparse.Namespace) -> int:
    """``airl-fast score``."""
    from airl_fast.score_files import score_file

    return _use(arguments, score_file)


def rerank(arguments: argparse.Namespace) -> int:
    """``airl-fast rerank``."""
    from airl_fast.score_files import rerank_file

    return _use(
        arguments,
        rerank_file,
        by=arguments.by,
        method=arguments.method,
        temperature=arguments.temperature,
    )


def locate(arguments: argparse.Namespace) -> int:
    """``airl-fast locate``."""
    from airl_fast.score_files import locate_file

    return _use(arguments, locate_file)


def calibrate(arguments: argparse.Namespace) -> int:
    """``airl-fast calibrate``."""
    from airl_fast.score_files import calibrate_file

    made = calibrate_file(
        _loader(arguments),
        arguments.directory,
        arguments.input,
        end_of_text=arguments.end_of_text,
        folds=arguments.folds,
        seed=arguments.seed,
    )
    print(made.summary())
    return 0


def _use(arguments: argparse.Namespace, run: Callable[..., None], **options: Any) -> int:
    end_of_text = arguments.end_of_text
    load = _loader(arguments)
    run(load, arguments.input, arguments.output, end_of_text=end_of_text, **options)
    return 0


def _loader(arguments: argparse.Namespace) -> Callable[[], RewardScorer]:
    _hush()
    return partial(_scorer, arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """``airl-fast eval``."""
    from airl_fast.evaluation.files import evaluate_file

    name = arguments.input.name.split(".")[0]
    target = arguments.output or arguments.directory / "eval" / name

    def run(load: Callable[[], RewardScorer], source: Path, _: Path | None, **options: Any) -> None:
        evaluate_file(load, source, target, **options)

    status = _use(
        arguments,
        run,
        format=arguments.format,
        max_tokens=arguments.max_tokens,
        plots=arguments.plots,
        seed=arguments.seed,
    )
    print((target / "metrics.md").read_text("utf-8"))
    print(f"written: {', '.join(str(path) for path in sorted(target.iterdir()))}")
    return status


def _scorer(arguments: argparse.Namespace) -> RewardScorer:
    import torch

    from airl_fast.scorer import RewardScorer

    return RewardScorer.from_pretrained(
        arguments.directory,
        policy=arguments.policy,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        device=arguments.device,
        passes=arguments.passes,
        token_budget=arguments.token_budget,
        merge_steps=arguments.merge_steps,
    )


def serve(arguments: argparse.Namespace) -> int:
    """``airl-fast serve``."""
    from airl_fast.integrations.rewards import RewardReader
    from airl_fast.serving import server

    _hush()

    def load() -> RewardReader:
        scorer = _scorer(arguments)
        return RewardReader(scorer=scorer, value=arguments.value, reduce=arguments.reduce)

    server.serve(
        load,
        host=arguments.host,
        port=arguments.port,
        request_bytes=int(arguments.max_request_mib * 2**20),
        waiting=arguments.max_waiting,
        seconds=arguments.timeout,
        token_file=arguments.token_file,
    )
    return 0


def report(arguments: argparse.Namespace) -> int:
    """``airl-fast report``."""
    from airl_fast.report import report_run

    folder, output = arguments.directory, arguments.output
    if output is None and folder is None:
        raise ValueError("nowhere to write: give a run's folder, or --output FILE.html")
    output = output or folder / "report.html"
    options = ("scores", "traces", "located", "evaluation", "title", "max_traces")
    given = {name: getattr(arguments, name) for name in options}
    for text in report_run(output, folder=folder, **given):
        print(f"airl-fast: {text}", file=sys.stderr)
    print(output)
    return 0


def doctor(_: argparse.Namespace) -> int:
    """``airl-fast doctor``."""
    import rich

    from airl_fast.doctor import doctor as examine

    found = examine()
    rich.print(found)
    return 1 if found.problems else 0


def recipes(_: argparse.Namespace) -> int:
    """``airl-fast recipes``."""
    print("\n".join(recipe_lines()))
    return 0


def recipe_lines() -> list[str]:
    """Each recipe's name and the comment at the top of its file."""
    from importlib.resources import files

    from airl_fast.config import recipes as names

    lines = []
    for name in names():
        text = (files("airl_fast.recipes") / f"{name}.yaml").read_text("utf-8")
        head = [line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#"]
        lines += [name, *(f"    {line}" for line in head)]
    return lines


def _hush() -> None:
    """No bars of weights being loaded or written: the commands have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
