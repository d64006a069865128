"""Hours of the real commands, to see what creeps: ``python -m benchmarks.soak train|serve``.

    python -m benchmarks.soak train --minutes 120      airl-fast train arithmetic, more steps
    python -m benchmarks.soak serve --minutes 30       airl-fast serve under clients

The command runs in a process of its own, whose resident and unique memory, open file handles,
threads and processor time are sampled every few seconds into samples.csv, with the speed. In the
end Theil-Sen slopes are fitted after a warm-up and held against stated tolerances
(``soak_fit.py``): results.json, results.md, soak.png. Exit status 0 means that everything is flat,
3 that something drifts or that the soak was too short or noisy to say, 1 that the command failed.

A training step takes less time when the policy writes less, so the processor time is also given
for 1,000 sampled tokens. Every answer of the server is held to scores made in this process.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks import serving, serving_cases, soak_page
from benchmarks.environment import describe, slug
from benchmarks.soak_fit import Quantity, Trend, fit

_ENDLESS = 10_000_000  # steps; the soak ends the run
_RECIPE = "arithmetic"
_OWN = (
    Quantity(name="resident memory", column="rss_mib", unit="MiB", tolerance=10),
    Quantity(name="unique memory", column="uss_mib", unit="MiB", tolerance=10),
    Quantity(name="lowest resident memory", column="rss_mib", unit="MiB", tolerance=5,
             lowest=True),
    Quantity(name="lowest unique memory", column="uss_mib", unit="MiB", tolerance=5, lowest=True),
    Quantity(name="open file handles", column="handles", unit="", tolerance=1),
    Quantity(name="threads", column="threads", unit="", tolerance=1),
)  # fmt: skip
_TRAIN = (
    *_OWN,
    Quantity(name="time of a step", column="step_seconds", unit="s", tolerance=5, relative=True),
    Quantity(name="processor time of a step", column="cpu_seconds", per="steps", unit="s",
             tolerance=5, relative=True),
    Quantity(name="processor time of 1,000 sampled tokens", column="cpu_seconds",
             per="kilotokens", unit="s", tolerance=5, relative=True),
)  # fmt: skip
_SERVE = (
    *_OWN,
    Quantity(name="requests a second", column="requests_per_second", unit="/s", tolerance=5,
             relative=True),
    Quantity(name="p50", column="p50_ms", unit="ms", tolerance=5, relative=True),
    Quantity(name="p99", column="p99_ms", unit="ms", tolerance=10, relative=True),
    Quantity(name="processor time of a request", column="cpu_seconds", per="requests", unit="s",
             tolerance=5, relative=True),
)  # fmt: skip


class Log:
    """samples.csv, written as it grows, so that a soak that is cut off leaves its samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[dict[str, Any]] = []
        self._start = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the log was opened."""
        return (time.monotonic() - self._start) / 60

    def pauses(self, interval: float) -> int:
        """How often the machine held everything for three intervals (in seconds) or more."""
        times = [sample["minutes"] for sample in self.samples]
        return sum(60 * (after - before) > 3 * interval for before, after in pairwise(times))

    def read(self) -> None:
        """Take the samples that an earlier soak has left."""
        with self.path.open(newline="") as file:
            for row in csv.DictReader(file):
                self.samples.append(
                    {k: value if k == "phase" else float(value) for k, value in row.items()}
                )

    def add(self, process: psutil.Process, values: dict[str, Any]) -> None:
        """Append what the process holds now, and the values."""
        with process.oneshot():
            memory, cpu = process.memory_full_info(), process.cpu_times()
            sample = {
                "minutes": round(self.minutes, 4),
                "rss_mib": round(memory.rss / 2**20, 2),
                "uss_mib": round(memory.uss / 2**20, 2),
                "handles": process.num_fds(),
                "threads": process.num_threads(),
                "cpu_seconds": round(cpu.user + cpu.system, 2),
                **values,
            }
        self.samples.append(sample)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, sample)
            if len(self.samples) == 1:
                writer.writeheader()
            writer.writerow(sample)


class Steps:
    """What a run's metrics.jsonl has said so far; only what was added is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._values = {"steps": 0, "kilotokens": 0.0, "phase": "", "length": math.nan}

    def read(self, samples_a_step: int) -> dict[str, Any]:
        """Counts so far, and the median time of the steps that are new."""
        rows = []
        if self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._place)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # half-written
                    self._place += len(line)
                    rows.append(json.loads(line))
        for row in rows:
            length = row.get("rollout/length", 0.0)
            self._values["steps"] = row["step"]
            self._values["phase"] = row["phase"]
            self._values["length"] = round(length, 3)
            total = self._values["kilotokens"] + length * samples_a_step / 1000
            self._values["kilotokens"] = round(total, 3)
        seconds = [row["seconds"] for row in rows]
        middle = round(statistics.median(seconds), 4) if seconds else math.nan
        return {**self._values, "step_seconds": middle}


def soak_training(log: Log, minutes: float, interval: float, overrides: Sequence[str]) -> int:
    """Train for a while, as ``airl-fast train`` does; return how many samples are warm start.

    Raises:
        RuntimeError: the run ended by itself, or does not exit with 0 when it is told to.
    """
    from airl_fast.config import load_config

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        settings = [f"run.steps={_ENDLESS}", *overrides, f"run.output_dir={folder}"]
        sampling = load_config(_RECIPE, settings).sampling
        steps = Steps(folder / "metrics.jsonl")
        words = Path(temporary) / "words"
        with _running([sys.executable, "-m", "airl_fast", "train", _RECIPE, *settings], words) as (
            process,
            watched,
        ):
            while log.minutes < minutes:
                time.sleep(interval)
                if process.poll() is not None:
                    tail = words.read_text("utf-8", "replace")[-2000:]
                    raise RuntimeError(f"the run ended by itself ({process.returncode}): {tail}")
                log.add(watched, steps.read(sampling.prompts_per_step * sampling.group_size))
            process.send_signal(signal.SIGTERM)  # a shell's background jobs do not hear SIGINT
            if (status := process.wait(300)) != 0:
                raise RuntimeError(f"the run exits with {status} on SIGTERM, not with 0")
    return sum(sample["phase"] != "policy" for sample in log.samples)


@contextmanager
def _running(command: Sequence[str], words: Path) -> Iterator[tuple[Any, psutil.Process]]:
    """A process whose words go to a file, and which never outlives this one's ``with``."""
    with words.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def soak_server(log: Log, minutes: float, interval: float, clients: int) -> dict[str, Any]:
    """Ask a server without a pause, in windows; return counts over all of them.

    Connections are made anew in every window, so that those that are not closed would show; a
    sample is taken between two windows, when nobody asks.

    Raises:
        RuntimeError: an answer was lost or wrong, or the server does not exit with 0.
    """
    totals = {"requests": 0, "lost": 0, "mixed_up": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        end = serving_cases.save_reward(folder, "arithmetic-base", "lm")
        cases = serving.expected(folder, serving_cases.pairs(None, 64))
        with serving.served(folder) as (process, port):
            watched = psutil.Process(process.pid)
            while log.minutes < minutes:
                seed = len(log.samples)
                found = serving.load(
                    port, cases, clients=clients, seconds=interval, end=end, seed=seed
                )
                for name in totals:
                    totals[name] += found[name]
                if found["lost"] or found["mixed_up"]:
                    raise RuntimeError(f"{found['first_failures']} after {totals}")
                speed = {name: found[name] for name in ("requests_per_second", "p50_ms", "p99_ms")}
                log.add(watched, {**totals, **speed})
            process.send_signal(signal.SIGTERM)
            if (status := process.wait(120)) != 0:
                raise RuntimeError(f"the server exits with {status} on SIGTERM, not with 0")
    return {"clients": clients, **totals}


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, fit, and write it all down."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command ends, too
    environment = describe()
    results = Path(__file__).parent / "results" / slug(environment)
    output = arguments.output or results / f"soak-{arguments.what}"
    output.mkdir(parents=True, exist_ok=True)
    path = output / "samples.csv"
    loaded = "unknown" if arguments.again else round(os.getloadavg()[0], 2)
    about: dict[str, Any] = {"load_before": loaded}
    interval = arguments.interval
    early = 0
    quantities = _TRAIN if arguments.what == "train" else _SERVE
    if not arguments.again:
        path.unlink(missing_ok=True)
    log = Log(path)
    if arguments.again:
        log.read()
        early = sum(sample.get("phase", "policy") != "policy" for sample in log.samples)
    elif arguments.what == "train":
        about["overrides"] = arguments.overrides
        early = soak_training(log, arguments.minutes, interval, arguments.overrides)
    else:
        about |= soak_server(log, arguments.minutes, interval, arguments.clients)
    warmup = arguments.minutes / 10 if arguments.warmup is None else arguments.warmup
    start = log.samples[early]["minutes"] if early < len(log.samples) else log.minutes
    warm = [sample for sample in log.samples[early:] if sample["minutes"] >= start + warmup]
    try:
        trends = [fit(warm, quantity) for quantity in quantities]
    except ValueError as error:
        print(f"nothing can be said: {error}", file=sys.stderr)
        trends = []
    about |= {"samples": len(log.samples), "fitted": len(warm), "warmup_minutes": start + warmup}
    about["pauses"] = log.pauses(interval)
    soak_page.write(output, arguments.what, log.samples, trends, about, environment)
    return 0 if trends and all(_is_flat(trend) for trend in trends) else 3


def _is_flat(trend: Trend) -> bool:
    return trend.verdict == "flat"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    train = kinds.add_parser("train", help="a run of the recipe arithmetic that does not end")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as run.threads=1")
    serve = kinds.add_parser("serve", help="a server that is asked without a pause")
    serve.add_argument("--clients", type=int, default=8, metavar="N", help="(default: %(default)s)")
    for kind, minutes, interval in ((train, 120.0, 5.0), (serve, 30.0, 10.0)):
        kind.add_argument("--minutes", type=float, default=minutes, metavar="M",
                          help="(default: %(default)s)")  # fmt: skip
        kind.add_argument("--interval", type=float, default=interval, metavar="SECONDS",
                          help="between samples (default: %(default)s)")  # fmt: skip
        kind.add_argument("--warmup", type=float, metavar="M",
                          help="minutes that are not fitted (default: a tenth)")  # fmt: skip
        kind.add_argument("--again", action="store_true",
                          help="fit the samples.csv of a soak that was cut off")  # fmt: skip
        kind.add_argument("--output", type=Path, metavar="DIR",
                          help="(default: results/HARDWARE-DATE/soak-KIND)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
