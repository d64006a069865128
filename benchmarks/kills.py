"""SIGKILL at random moments of a run, resumed each time: ``python -m benchmarks.kills``.

Every kill is of a run of its own: a process of ``airl-fast train`` is killed, the same command is
given again and left to end, and the folder is compared with that of a run that nobody killed, byte
for byte: checkpoints, exported policy and reward, configuration, best.json, and the metrics but for
the seconds in them. Runs are made in working directories of their own with ``run.output_dir=run``,
so that nothing in them may differ. A share of the kills is aimed, at

- start: the moment at which the run's folder is made,
- write: a checkpoint that is being written (its temporary folder is there),
- export: policy/ and reward/ being written at the end;

the others come at any moment of any step. Moments are drawn from ``--seed``. Every run is a process
of its own, forked from one that has imported the package and done nothing else: importing it anew
would be most of the study's time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import airl_fast.progress
import airl_fast.trainer  # noqa: F401  (what the command imports when it runs)
from airl_fast.checkpoint import latest_checkpoint
from airl_fast.cli import main
from benchmarks import environment

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "run.steps=4",
    "run.threads=1",
    "run.eval_every=2",
    "run.eval_samples=2",
    "run.checkpoint_every=2",
    "algorithm.sft_warmup=2",
    "algorithm.kl_beta=0.1",
    "discriminator.warmup_updates=2",
    "discriminator.perturbed_per_update=4",
    "discriminator.replay=16",
    "discriminator.replay_fraction=0.5",
    "sampling.prompts_per_step=4",
    "sampling.group_size=2",
    "sampling.temperature=0.8",
    "task.demonstrations=40",
    "task.unlabelled=40",
    "task.validation=8",
    "task.test=8",
)
STEPS = 8  # the warm starts included
_ATTEMPTS = 5  # where a run ended, or its moment passed, before the kill came
_POLL = 0.0005  # seconds


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    aim: str
    finished: int  # steps in metrics.jsonl
    checkpoint: str  # the newest whole one
    unfinished: list[str]  # temporary names that were left
    seconds: float  # of the killed process's life
    resumed: int | None  # the exit status of the second process
    differences: list[str]


def start(cwd: Path, prepare: Callable[[], None] = lambda: None) -> ForkProcess:
    """Start the run in ``cwd``/run; ``prepare`` is called in its process."""
    cwd.mkdir(parents=True, exist_ok=True)
    process = get_context("fork").Process(target=_train, args=(cwd, prepare))
    process.start()
    return process


def _train(cwd: Path, prepare: Callable[[], None]) -> None:
    os.chdir(cwd)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    prepare()
    sys.exit(main(["train", "arithmetic", "run.output_dir=run", *RUN]))


def ended(process: ForkProcess) -> int | None:
    """Wait for the end; the exit status."""
    process.join()
    return process.exitcode


def differences(whole: Path, other: Path) -> list[str]:
    """What of two runs' folders differs; nothing, if one was as good as the other.

    Returns:
        Names of files that are in one only, or that have other bytes in the other; metrics.jsonl
        is compared without the seconds.
    """
    found = []
    names = {p.relative_to(folder) for folder in (whole, other) for p in folder.rglob("*")}
    for name in sorted(names):
        one, two = whole / name, other / name
        if not (one.exists() and two.exists()):
            found.append(f"{name}: only in one")
        elif one.is_file() and _content(one) != _content(two):
            found.append(f"{name}: other bytes")
    return found


def _content(file: Path) -> object:
    if file.name != "metrics.jsonl":
        return file.read_bytes()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def unfinished(run: Path) -> list[str]:
    """Temporary names in a run's folder."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*.tmp-*"))


def kill_and_resume(cwd: Path, whole: Path, aim: str, rng: random.Random) -> Kill | None:
    """Kill one run, resume it and compare; None where the kill came too late."""
    began = time.monotonic()
    process = start(cwd)
    arrived = _wait(process, _moment(aim, cwd / "run", rng))
    time.sleep(rng.random() * {"start": 0.02, "write": 0.04, "export": 0.03, "step": 0.4}[aim])
    process.kill()
    seconds = time.monotonic() - began
    if ended(process) == 0 or not arrived:
        return None
    left = unfinished(cwd / "run")
    metrics = cwd / "run" / "metrics.jsonl"
    finished = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    checkpoint = _newest(cwd / "run" / "checkpoints")
    resumed = ended(start(cwd))
    found = differences(whole, cwd / "run")
    return Kill(aim, finished, checkpoint, left, round(seconds, 2), resumed, found)


def _newest(folder: Path) -> str:
    path = latest_checkpoint(folder)
    return path.name if path else "none"


def _wait(process: ForkProcess, there: Callable[[], bool]) -> bool:
    while not there():
        if not process.is_alive():
            return False
        time.sleep(_POLL)
    return True


def _moment(aim: str, run: Path, rng: random.Random) -> Callable[[], bool]:
    """Whether the time has come, to be asked again and again."""
    if aim == "start":
        return run.exists
    if aim == "export":
        what = rng.choice(("policy", "reward"))
        return lambda: any(run.glob(f"{what}.tmp-*"))
    step = rng.randrange(STEPS)
    if aim == "step":
        return lambda: _lines(run / "metrics.jsonl") >= step
    # A write after this step; the last of all is after the last step.
    return lambda: _lines(run / "metrics.jsonl") > step and any(run.glob("checkpoints/*.tmp-*"))


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def aims(kills: int) -> list[str]:
    """What each kill is aimed at: a third at writes, some at the export and at the start."""
    export, started, write = max(1, kills // 8), max(1, kills // 12), max(1, kills // 3)
    named = ["write"] * write + ["export"] * export + ["start"] * started
    return (named + ["step"] * kills)[:kills]


def table(kills: Sequence[Kill]) -> str:
    """A Markdown table of the kills."""
    lines = [
        "| aimed at | steps finished | whole checkpoint | left unfinished | resumed with status | "
        "differs in |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kill in kills:
        left = ", ".join(name.split(".tmp-")[0] + ".tmp" for name in kill.unfinished) or "nothing"
        differs = ", ".join(kill.differences) or "nothing"
        row = (kill.aim, kill.finished, kill.checkpoint, left, kill.resumed, differs)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def write(found: dict[str, Any], kills: Sequence[Kill], folder: Path) -> None:
    """Write results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    same = sum(not kill.differences and kill.resumed == 0 for kill in kills)
    writing = sum(bool(kill.unfinished) for kill in kills)
    machine = found["environment"]
    text = (
        "# Killed and resumed\n\n"
        f"{machine['hardware']}, {machine['cores']} cores, one thread, "
        f"{str(machine['date'])[:10]}, airl_fast {machine['versions']['airl_fast']}, torch "
        f"{machine['versions']['torch']}. Made by `python -m benchmarks.kills --kills "
        f"{found['asked']} --seed {found['seed']}`.\n\n"
        f"{same} of {len(kills)} runs that were killed once by SIGKILL and resumed by the same "
        f"command ended with the bytes of the run that was not. {writing} kills left something "
        f"half-written; {found['late']} more came after the moment they were aimed at, and were "
        "made again.\n\n"
    )
    (folder / "results.md").write_text(text + table(kills) + "\n")


def study() -> int:
    """Run the study; 1 where a resumed run ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=25, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="default: benchmarks/results/HARDWARE-DATE/kills")  # fmt: skip
    options = parser.parse_args()

    described = environment.describe()
    folder = options.output or ROOT / "benchmarks/results" / environment.slug(described) / "kills"
    rng, kills, late = random.Random(options.seed), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("whole", "again"):
            if ended(start(root / name)) != 0:
                raise RuntimeError((root / name / "log.txt").read_text())
        whole = root / "whole" / "run"
        if differing := differences(whole, root / "again" / "run"):
            raise RuntimeError(f"two runs that nobody killed differ: {differing}")
        for i, aim in enumerate(aims(options.kills)):
            for attempt in range(_ATTEMPTS):
                kill = kill_and_resume(root / f"{i}-{attempt}", whole, aim, rng)
                if kill is not None:
                    break
                late += 1
            else:
                raise RuntimeError(f"no kill aimed at {aim} came in time; is the machine busy?")
            kills.append(kill)
            found = {"environment": described, "seed": options.seed, "late": late, "run": RUN,
                     "asked": options.kills, "kills": [asdict(kill) for kill in kills]}  # fmt: skip
            write(found, kills, folder)
            print(f"{i + 1}/{options.kills} {table([kill]).splitlines()[-1]}", flush=True)
    print(folder / "results.md")
    return int(any(kill.differences or kill.resumed for kill in kills))


if __name__ == "__main__":
    sys.exit(study())
