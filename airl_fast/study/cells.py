"""The cells of a study: what each runs in its worker process, and what it waits for.

A cell has a folder and, once it is done, result.json in it, which others read. Of one seed:

    START/sft-RATE   one arm of SFT: the accuracy of every checkpoint on validation problems
    START            what it starts from, chosen and measured: base and SFT
    VARIANT          trained from there, measured; its reward reranks and locates
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from airl_fast import jobs
from airl_fast.config import RunConfig
from airl_fast.durable import make_folder, write_text
from airl_fast.export import export_run
from airl_fast.measuring import choose_sft, forget_checkpoints, measure, sft_overrides, train_sft
from airl_fast.reward_uses import use_reward
from airl_fast.study.spec import Study, folder_name

RESULT = "result.json"
SFT, SAMPLED_SFT, BASE = "SFT", "SFT chosen at T = 1", "base"
# Of metrics.jsonl, at every evaluation
CURVES = ("valid/pass@1", "valid/kl", "valid/f", "valid/auc_f", "policy/entropy", "disc/accuracy",
          "disc/throttled", "reward/mean")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run, or the measuring of a start.

    Attributes:
        seed: its row.
        kind: "arm", "start" or "variant".
        name: of the start or variant.
        arm: which SFT arm, where it is one.
        folder: its own.
        needs: folders of the cells that have to be done before.
    """

    seed: int
    kind: Literal["arm", "start", "variant"]
    name: str
    arm: int = 0
    folder: Path
    needs: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """What it is called on the terminal."""
        arm = f", SFT arm {self.arm + 1}" if self.kind == "arm" else ""
        return f"seed {self.seed}: {self.name}{arm}"

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    def result(self) -> dict[str, Any]:
        """What it found."""
        found: dict[str, Any] = json.loads((self.folder / RESULT).read_text("utf-8"))
        return found


def plan(study: Study, output: Path) -> list[Cell]:
    """Every cell, each after those that it needs; seed by seed."""
    cells = []
    for seed in study.seeds:
        row = output / f"seed-{seed}"
        for start in study.starts:
            folder = row / folder_name(start)
            arms = [
                Cell(seed=seed, kind="arm", name=start, arm=i, folder=folder / f"sft-{i + 1}")
                for i in range(len(study.sft_arms))
            ]
            needs = tuple(arm.folder for arm in arms)
            cells += arms
            cells.append(Cell(seed=seed, kind="start", name=start, folder=folder, needs=needs))
        for name, variant in study.variants.items():
            waits = [row / folder_name(study.start_of(variant))]
            if variant.reward_from is not None:
                waits.append(row / folder_name(variant.reward_from))
            folder = row / folder_name(name)
            cells.append(
                Cell(seed=seed, kind="variant", name=name, folder=folder, needs=tuple(waits))
            )
    return cells


def cell_config(study: Study, cell: Cell) -> RunConfig:
    """The configuration of a cell, once what it needs is done."""
    if cell.kind == "arm":
        rate, steps = study.sft_arms[cell.arm]
        arm = sft_overrides(rate, steps, study.sft_checkpoints)
        return study.config(cell.seed, cell.folder, cell.name, *arm)
    if cell.kind == "start":
        return study.config(cell.seed, cell.folder, cell.name)
    variant = study.variants[cell.name]
    overrides = list(variant.overrides)
    if variant.init != "base":
        chosen = json.loads((cell.needs[0] / RESULT).read_text("utf-8"))["chosen"]
        overrides.append(f"policy.model={chosen[variant.init]}")
    if variant.reward_from is not None:
        overrides.append(f"discriminator.saved={cell.needs[1] / 'reward'}")
    return study.config(cell.seed, cell.folder, study.start_of(variant), *overrides)


def run_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Run a cell to its end, write its result, and give it back; in a worker process.

    Raises:
        jobs.StoppedError: asked to stop; what was trained is saved.
    """
    started = time.perf_counter()
    run = {"arm": _arm, "start": _start, "variant": _variant}[cell.kind]
    config = cell_config(study, cell)
    result = {**run(study, cell, config), "seconds": time.perf_counter() - started}
    make_folder(cell.folder)
    write_text(cell.folder / RESULT, json.dumps(result))
    forget_checkpoints(cell.folder)
    return result


def _arm(study: Study, cell: Cell, config: RunConfig) -> dict[str, Any]:
    return {"scores": train_sft(config)}


def _start(study: Study, cell: Cell, config: RunConfig) -> dict[str, Any]:
    scores: dict[str, tuple[float, float]] = {}
    for folder in cell.needs:
        scores |= json.loads((folder / RESULT).read_text("utf-8"))["scores"]
    greedy, sampled = choose_sft(scores)
    models = {BASE: config.policy.model, SFT: greedy, SAMPLED_SFT: sampled}
    once = dict.fromkeys(models.values())  # both choices are often one checkpoint
    found = {model: asdict(_measured(study, config, model)) for model in once}
    return {
        "chosen": {"greedy": greedy, "sampled": sampled},
        "methods": {name: found[model] for name, model in models.items()},
    }


def _variant(study: Study, cell: Cell, config: RunConfig) -> dict[str, Any]:
    trained = jobs.train(config).folder.path
    if study.checkpoint == "best":
        trained = export_run(cell.folder, "best")
    result: dict[str, Any] = {"measured": asdict(_measured(study, config, trained / "policy"))}
    if config.algorithm.name == "airl":
        start = config.policy.model
        uses = use_reward(trained / "reward", start, config, samples=study.rerank_samples)
        result |= asdict(uses)
    return {**result, "curves": read_curves(cell.folder, config)}


def _measured(study: Study, config: RunConfig, model: str | Path) -> Any:
    return measure(model, config, temperatures=study.temperatures, samples=study.samples)


def read_curves(folder: Path, config: RunConfig) -> dict[str, list[tuple[int, float]]]:
    """What every evaluation of a run found, by metric: policy steps and values.

    Steps are negative before the policy moves.
    """
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    first = config.sft_steps + config.warmup_steps
    curves: dict[str, list[tuple[int, float]]] = {}
    for metrics in map(json.loads, lines):
        for key in CURVES if "valid/pass@1" in metrics else ():
            if key in metrics:
                curves.setdefault(key, []).append((metrics["step"] - first, metrics[key]))
    return curves


def waiting_for(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that it needs and that are not done."""
    return [other for other in cells if other.folder in cell.needs and not other.done]
