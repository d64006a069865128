"""Score a batch of traces, rerank samples, vote, locate an error, and calibrate that.

python examples/score_and_rerank.py            # trains a small reward first, on a CPU
python examples/score_and_rerank.py runs/demo  # uses the reward of a finished run of arithmetic
"""

import random
import sys
import tempfile
from pathlib import Path

from airl_fast import RewardScorer
from airl_fast.alignment import project
from airl_fast.calibrating import LabelledSteps, calibrate
from airl_fast.config import load_config
from airl_fast.tasks.arithmetic import Arithmetic
from airl_fast.trainer import Trainer

PROMPT = "68+4+2+9-6="
RIGHT = "68+4=72;72+2=74;74+9=83;83-6=77;#77."
WRONG = "68+4=72;72+2=75;75+9=84;84-6=78;#78."


def train(folder: Path) -> None:
    """Train a reward on the built-in arithmetic task, for a few seconds."""
    overrides = [
        "run.steps=2", "run.eval_every=2", "algorithm.sft_warmup=2",
        "discriminator.warmup_updates=4", "sampling.prompts_per_step=4", "sampling.group_size=2",
        "task.demonstrations=40", "task.unlabelled=40", "task.validation=8", "task.test=8",
        f"run.output_dir={folder}",
    ]  # fmt: skip
    Trainer(load_config("arithmetic", overrides)).train()


def main(folder: Path) -> None:
    """Show what a reward says."""
    scorer = RewardScorer.from_pretrained(folder)
    print(f"trained for spans of granularity {scorer.trained.granularity!r}")

    for scored in scorer.score([PROMPT, PROMPT], [RIGHT, WRONG]):
        print(f"f {scored.f:.2f}, f - log pi {scored.reward:.2f}")
        for step in scored.steps:
            print(f"  {step.start:2}-{step.end:2} {step.text:10} {step.f:8.3f}")

    samples = [WRONG, RIGHT, WRONG]
    for method in ("best", "majority", "weighted"):
        ranking = scorer.rerank(PROMPT, samples, method=method)
        print(f"{method}: answer {ranking.answer}, weight {ranking.weight}, order {ranking.order}")

    found = scorer.locate(PROMPT, WRONG)
    print(f"lowest: step {found.step}, {found.text!r}")

    scorer.calibration = calibrate(labelled(scorer))
    print(scorer.calibration.summary())
    for completion in (RIGHT, WRONG):
        found = scorer.locate(PROMPT, completion)
        print(f"deviates: step {found.step}, confidence {found.confidence:.2f}")

    (scored,) = scorer.score([PROMPT], [RIGHT])
    rewards = project(scored, scored.tokens.ids, scorer.tokenizer, credit="spread")
    print(f"per token, for a policy: {[round(value, 3) for value in rewards[:8]]} ...")


def labelled(scorer: RewardScorer, count: int = 24) -> list[LabelledSteps]:
    """Traces of which every other has a planted error, with their steps' f."""
    task, rng = (
        Arithmetic(1, demonstrations=4, unlabelled=4, validation=4, test=count),
        random.Random(0),
    )
    prompts, completions, labels = [], [], []
    for i, example in enumerate(task.test):
        completion, label = example.completion, -1
        if i % 2:
            completion, label = task.corrupt(completion, rng)
        prompts.append(example.prompt)
        completions.append(completion)
        labels.append(label)
    return [
        LabelledSteps(
            f=tuple(step.f for step in scored.steps),
            num_tokens=tuple(step.num_tokens for step in scored.steps),
            label=label,
        )
        for scored, label in zip(scorer.score(prompts, completions), labels, strict=True)
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            train(Path(made))
            main(Path(made))
