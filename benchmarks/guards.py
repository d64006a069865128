"""What the guards and an audit cost: seconds of processor time a step, of one recipe's run.

    python -m benchmarks.guards                                  # arithmetic, 8 steps of each phase
    python -m benchmarks.guards --steps 3 gsm8k-smollm2 policy.model=DIR task.path=DIR

Three runs from the same seed take turns, step by step: without guards, with the default ones, and
with an audit at every step. Processor time, not time by the clock, so that a busy machine changes
little. The first step of each phase is left out. On a GPU the time is that of the host.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median

from airl_fast.config import load_config
from airl_fast.rollout import distinct_ngrams
from airl_fast.trainer import Trainer

VARIANTS = {"without guards": None, "guards": 0, "guards, audit at every step": 1}
TINY = ("run.eval_every=0", "run.checkpoint_every=1000000")


def main() -> None:
    """Print a table: phase, variant, median seconds a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="of each phase (default: %(default)s)")
    parser.add_argument("recipe", nargs="?", default="arithmetic")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    steps = arguments.steps + 1
    phases = (f"run.steps={steps}", f"algorithm.sft_warmup={steps}")
    phases += (f"discriminator.warmup_updates={steps}",)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, every in VARIANTS.items():
            more = [f"run.output_dir={folder}/{len(trainers)}", f"guards.audit_every={every or 0}"]
            options = [*TINY, *phases, *arguments.overrides, *more]
            trainers[name] = Trainer(load_config(arguments.recipe, options))
        seconds = _take_turns(trainers)
    print("| phase | " + " | ".join(VARIANTS) + " |\n|" + " --- |" * (1 + len(VARIANTS)))
    for phase in dict.fromkeys(phase for phase, _ in seconds):
        cells = [f"{median(seconds[phase, name][1:]):.4f} s" for name in VARIANTS]
        print(f"| {phase} | {' | '.join(cells)} |")
    completions = [[i % 97 for i in range(256)]] * 256
    started = time.process_time()
    distinct_ngrams(completions)
    print(f"repetition, 256 completions of 256 tokens: {time.process_time() - started:.4f} s")


def _take_turns(trainers: dict[str, Trainer]) -> dict[tuple[str, str], list[float]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    for step in range(next(iter(trainers.values())).total_steps):
        for name, trainer in trainers.items():
            phase = trainer._phase(step)
            started = time.process_time()
            if VARIANTS[name] is None:
                trainer._make_step(step)
            else:
                trainer.guards.step(trainer._make_step, step, phase)
            trainer.step += 1
            seconds.setdefault((phase, name), []).append(time.process_time() - started)
    return seconds


if __name__ == "__main__":
    main()
