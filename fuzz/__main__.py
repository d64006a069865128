"""Fuzz with atheris: ``python -m fuzz NAME|all --seconds 300`` (needs the ``fuzz`` extra).

libFuzzer's byte mutations, guided by the coverage of airl_fast, take turns with mutations of JSON
trees (``mutations.py``). A finding does not stop the run: its kind is said once, and its first
input is kept in ``--findings``; so is an input that takes 10 seconds or more (slow-unit-...).
``all`` runs every target in a process of its own and writes a table. Exit status 1: something was
found.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAMES = ("readers", "files", "tasks", "calibration", "trained", "checkpoint", "metrics", "report",
          "config", "server")  # fmt: skip
_LARGEST = 400_000  # bytes of an input


def signature(error: BaseException) -> str:
    """The kind of a finding: its type, and the innermost line of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "airl_fast" in f.filename or "/kernels/" in f.filename]
    frame = (ours or frames)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.name}"


def watched(
    target: Callable[[bytes, Path], None], folder: Path, findings: Path, seen: Counter[str]
) -> Callable[[bytes], None]:
    """The target as libFuzzer calls it: findings are counted and kept, and do not stop it."""

    def run(data: bytes) -> None:
        try:
            target(data, folder)
        except Exception as error:
            kind = signature(error)
            seen[kind] += 1
            if seen[kind] == 1:
                findings.mkdir(parents=True, exist_ok=True)
                name = re.sub(r"\W+", "-", kind)
                (findings / name).write_bytes(data)
                print(f"FINDING {kind}: {str(error)[:300]!r} for {data[:120]!r}", flush=True)

    return run


def fuzz(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one target for a while; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["airl_fast"], enable_loader_override=False):
        from fuzz.targets import TARGETS
    from fuzz.mutations import Raw, dumps, mutated

    target = TARGETS[name]

    def change(data: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, largest)
        variant = rng.randrange(len(target.seeds))
        made = mutated(target.seeds[variant], rng)
        prefix = bytes(rng.randrange(256) for _ in range(3)) if variant == 4 else b""
        return (bytes([variant]) + prefix + made)[:largest]

    with tempfile.TemporaryDirectory() as temporary:
        corpus, work = Path(temporary) / "corpus", Path(temporary) / "work"
        corpus.mkdir()
        work.mkdir()
        for variant, seeds in enumerate(target.seeds):
            for i, seed in enumerate(seeds):
                raw = isinstance(seed, Raw)
                content = seed.text.encode("latin-1", "replace") if raw else dumps(seed)
                (corpus / f"{variant}-{i}").write_bytes(bytes([variant]) + content)
        findings.mkdir(parents=True, exist_ok=True)
        run = watched(target, work, findings / name, Counter())
        options = [
            f"-max_total_time={seconds}", f"-max_len={_LARGEST}", "-timeout=60",
            "-rss_limit_mb=4096", "-print_final_stats=1", "-len_control=0",
            f"-artifact_prefix={findings}/{name}-",
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, str(corpus)], run, custom_mutator=change)
        atheris.Fuzz()


def fuzz_all(seconds: int, findings: Path, output: Path | None) -> int:
    """Fuzz every target, one after the other, and write what came of it."""
    rows: list[dict[str, Any]] = []
    for name in _NAMES:
        command = [sys.executable, "-m", "fuzz", name, "--seconds", str(seconds)]
        command += ["--findings", str(findings)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = re.findall(r"^FINDING (.*)$", done.stdout, re.MULTILINE)
        executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
        covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stdout)
        if executed is None or not covered:
            print(done.stdout[-3000:])
            raise RuntimeError(f"{name} ended with {done.returncode} before its time")
        edges, features, corpus = map(int, covered[-1])
        rows.append({
            "target": name, "seconds": seconds, "executions": int(executed[1]), "edges": edges,
            "features": features, "corpus": corpus, "findings": found,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if output is not None:
        output.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(
        "| target | executions | edges | kept inputs | findings |\n| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        print(f"| {row['target']} | {row['executions']:,} | {row['edges']:,} | {row['corpus']} | "
              f"{len(row['findings'])} |")  # fmt: skip
    return 1 if any(row["findings"] for row in rows) else 0


def main() -> int:
    """Fuzz what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=(*_NAMES, "all"))
    parser.add_argument("--seconds", type=int, default=300, metavar="N", help="(default: 300)")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"), metavar="DIR",
                        help="(default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results of all")
    arguments = parser.parse_args()
    if arguments.target == "all":
        return fuzz_all(arguments.seconds, arguments.findings, arguments.output)
    fuzz(arguments.target, arguments.seconds, arguments.findings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
