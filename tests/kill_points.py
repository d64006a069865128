"""Runs that kill themselves at chosen points: ``python -m tests.kill_points FOLDER``.

One run is killed at each point in turn, always by the same command, and goes on; in the end it is
compared with a run that nobody killed. Every attempt is a forked process, killed by SIGKILL.
"""

import os
import signal
import sys
from pathlib import Path

from airl_fast import best, checkpoint, discriminator, durable, run_folder
from benchmarks.kills import differences, ended, start


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def after(module, name, calls=1):
    """Die when the function has been called so many times; half of what it would write is there."""
    original, count = getattr(module, name), 0

    def call(*arguments, **options):
        nonlocal count
        count += 1
        if count == calls:
            original(*arguments, **options)
            die()
        return original(*arguments, **options)

    setattr(module, name, call)


def torn_line():
    """Half a line of metrics reaches the disk, of a step without a checkpoint."""
    record = run_folder.RunFolder.record

    def half(self, metrics):
        if metrics["step"] != 3:
            return record(self, metrics)
        with open("run/metrics.jsonl", "a") as file:
            file.write('{"step": 3, "pha')
        return die()

    run_folder.RunFolder.record = half


def best_half_written():
    def half(path, text):
        durable.temporary(path).write_text(text[:9])
        die()

    best.write_text = half


POINTS = {
    "the folder is made": lambda: after(run_folder, "make_folder"),
    "a temporary file is written": lambda: setattr(os, "replace", die),
    "its configuration is there": lambda: after(run_folder, "save_config"),
    "a torn line": torn_line,
    "tensors written, the rest not": lambda: after(checkpoint, "save_file"),
    "checkpoint written, not renamed": lambda: setattr(checkpoint, "move_into_place", die),
    "renamed, old ones not deleted": lambda: setattr(checkpoint, "prune_checkpoints", die),
    "an old one half deleted": lambda: after(checkpoint, "retire"),
    "best.json not written": lambda: setattr(best, "write_text", die),
    "best.json half-written": best_half_written,
    "the policy written, not renamed": lambda: setattr(durable, "move_into_place", die),
    "half of the reward": lambda: after(discriminator, "save_file"),
}


def run(folder):
    """Go through the points; return what differs in the end, and which points killed nothing."""
    whole, cut = folder / "whole", folder / "cut"
    wrong = [] if ended(start(whole)) == 0 else [(whole / "log.txt").read_text()]
    for name, prepare in POINTS.items():
        if ended(start(cut, prepare)) != -signal.SIGKILL:
            wrong.append(f"not killed where {name}")
    if ended(start(cut)) != 0:
        wrong.append((cut / "log.txt").read_text())
    return wrong + differences(whole / "run", cut / "run")


if __name__ == "__main__":
    print("\n".join(run(Path(sys.argv[1]))))
