"""Train discriminators on MMLU-Pro answers, score held-out ones, and say what f has learned.

    python -m studies.mmlu_pro --data FOLDER --model FOLDER --output runs/mmlu_pro

The strongest model's answers are the experts', the other three models' the policy's. Every
variant (head, granularity, seed) is trained on the same questions of one half and scored on the
same questions of the other. The command goes on where it stopped: training from its last
checkpoint, scoring from its last chunk. The page about it is docs/studies/mmlu_pro.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from airl_fast.batches import Shuffled
from airl_fast.building import create_discriminator, load_policy
from airl_fast.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from airl_fast.config import RunConfig, load_config
from airl_fast.discriminator import Discriminator
from airl_fast.learners import DiscriminatorLearner
from airl_fast.passes import action_logp, span_energies
from airl_fast.policy import Policy
from airl_fast.spans import span_rule
from airl_fast.tasks.choices import SENTENCES
from studies.mmlu_pro_analysis import analyse
from studies.mmlu_pro_data import MODELS, Asked, Data, load, tokens

HEADS = ("score", "lm")
GRANULARITIES = ("sparse", "step", "dense")
_CHUNK = 8  # questions scored between two writes
_CHECKPOINT_EVERY = 4  # updates


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One discriminator."""

    head: str
    granularity: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.head}-{self.granularity}-{self.seed}"


class Study:
    """The data, the frozen base model, and the folder that everything is kept in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_settings()
        self.policy = self._policy(0)
        self.data: Data = load(
            options.data,
            self.policy.tokenizer,
            train=options.train,
            test=options.test,
            max_prompt=options.max_prompt,
            max_completion=options.max_completion,
            seed=0,
        )
        self._logp: dict[int, list[torch.Tensor]] = {}
        self.variants = [
            Variant(head=head, granularity=granularity, seed=seed)
            for seed, head, granularity in product(
                range(options.seeds), options.heads, options.granularities
            )
        ]

    def run(self) -> None:
        """Everything that is not done yet, then the numbers."""
        data, say = self.data, self._say
        updates = -(-len(data.train) // self.options.batch) * self.options.epochs
        say(
            f"{len(data.train)} questions to train on ({tokens(data.train)} tokens), "
            f"{len(data.test)} to measure on ({tokens(data.test)} tokens); left out on the way: "
            + "; ".join(f"{count} {why}" for why, count in data.left_out.items())
        )
        say(f"{len(self.variants)} variants of {updates} updates each; trying out how fast it goes")
        self._estimate(updates)
        self._score_base()
        for i, variant in enumerate(self.variants, start=1):
            if self._lines(variant.name) == len(data.test):
                say(f"[{i}/{len(self.variants)}] {variant.name}: done before")
                continue
            started = time.monotonic()
            discriminator = self._trained(variant, updates, f"[{i}/{len(self.variants)}]")
            self._score(variant, discriminator)
            say(f"[{i}/{len(self.variants)}] {variant.name}: {time.monotonic() - started:.0f} s")
        facts = {
            "train_questions": len(data.train),
            "test_questions": len(data.test),
            "train_tokens": tokens(data.train),
            "test_tokens": tokens(data.test),
            "updates": updates,
            "left_out": data.left_out,
            "settings": self._settings(),
        }
        page = analyse(self.folder, data.test, [v.name for v in self.variants], facts)
        say(f"written: {page}")

    def config(self, variant: Variant) -> RunConfig:
        """What the library's learner is told: f alone for the score head, f - log pi for lm."""
        score = variant.head == "score"
        rate = self.options.score_learning_rate if score else self.options.lm_learning_rate
        return load_config(
            "mmlu-pro-smollm2",
            [
                f"policy.model={json.dumps(str(self.options.model))}",
                f"discriminator.head={variant.head}",
                "discriminator.trunk=own",
                f"discriminator.logit={'f' if score else 'f-logp'}",
                f"discriminator.head_learning_rate={rate}",
                f"discriminator.learning_rate={self.options.learning_rate}",
                "discriminator.span_logp=mean",
                f"algorithm.granularity={variant.granularity}",
                f"run.seed={variant.seed}",
                "run.device=cpu",
                f"run.token_budget={self.options.token_budget}",
                f"run.output_dir={json.dumps(str(self.folder / variant.name))}",
            ],
        )

    def _policy(self, seed: int) -> Policy:
        return load_policy(self.config(Variant(head="lm", granularity="step", seed=seed)))

    def _rule(self, granularity: str) -> Any:
        return span_rule(granularity, boundary=SENTENCES, tokenizer=self.policy.tokenizer)  # type: ignore[arg-type]

    def _trained(self, variant: Variant, updates: int, place: str) -> Discriminator:
        """Train one discriminator, from its last checkpoint if there is one."""
        config, folder = self.config(variant), self.folder / variant.name / "checkpoints"
        discriminator = create_discriminator(config, self.policy)
        learner = DiscriminatorLearner(discriminator, self.policy, config)
        done, latest = 0, latest_checkpoint(folder)
        if latest is not None:
            tensors, state = load_checkpoint(latest)
            learner.restore(tensors, state["learner"])
            done = state["updates"]
        order = Shuffled(self.data.train, variant.seed, "study questions")
        rule, started = self._rule(variant.granularity), time.monotonic()
        for update in range(done, updates):
            batch = order.take(update * self.options.batch, self.options.batch)
            metrics = learner.update(*self._batch(batch, rule))
            if (update + 1) % _CHECKPOINT_EVERY == 0 or update + 1 == updates:
                tensors, state = learner.state()
                values = {"learner": state, "updates": update + 1}
                save_checkpoint(folder, update + 1, tensors, values, keep=1)
                left = (time.monotonic() - started) / (update + 1 - done) * (updates - update - 1)
                self._say(
                    f"{place} {variant.name}: update {update + 1}/{updates}, loss "
                    f"{metrics['disc/loss']:.3f}, accuracy {metrics['disc/accuracy']:.3f}, "
                    f"{left:.0f} s to go"
                )
        return discriminator.eval()

    def _batch(self, asked: Sequence[Asked], rule: Any) -> tuple[list[Any], list[torch.Tensor]]:
        """The answers as traces with the base model's log pi, which is read once a run."""
        traces = [trace for i, one in enumerate(asked) for trace in one.traces(rule, i)]
        new = [one for one in asked if one.question.id not in self._logp]
        if new:
            fresh = [trace for i, one in enumerate(new) for trace in one.traces(rule, i)]
            found, n = action_logp(self.policy, fresh, self.options.token_budget), len(MODELS)
            for i, one in enumerate(new):
                self._logp[one.question.id] = found[i * n : (i + 1) * n]
        return traces, [part for one in asked for part in self._logp[one.question.id]]

    def _score(self, variant: Variant, discriminator: Discriminator) -> None:
        """f of every held-out answer: its sum and its mean over spans."""
        rule, budget = self._rule(variant.granularity), self.options.token_budget

        def score(traces: list[Any]) -> list[dict[str, float]]:
            energies = span_energies(discriminator, self.policy, traces, budget)
            return [{"f (sum)": float(f.sum()), "f (mean)": float(f.mean())} for f in energies]

        self._scored(variant.name, rule, score)
        shutil.rmtree(self.folder / variant.name / "checkpoints", ignore_errors=True)

    def _score_base(self) -> None:
        """log pi of every held-out answer under the untrained language model."""

        def score(traces: list[Any]) -> list[dict[str, float]]:
            logp = action_logp(self.policy, traces, self.options.token_budget)
            return [
                {"log pi (sum)": float(part.sum()), "log pi (mean)": float(part.mean())}
                for part in logp
            ]

        self._scored("base", self._rule("sparse"), score)

    def _scored(self, name: str, rule: Any, score: Any) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        test, done = self.data.test, self._lines(name)
        for start in range(done, len(test), _CHUNK):
            asked = test[start : start + _CHUNK]
            traces = [trace for i, one in enumerate(asked) for trace in one.traces(rule, i)]
            found, n = score(traces), len(MODELS)
            with path.open("a") as file:
                for i, one in enumerate(asked):
                    line = {"id": one.question.id, "scores": found[i * n : (i + 1) * n]}
                    file.write(json.dumps(line, allow_nan=False) + "\n")
            if (start // _CHUNK) % 4 == 3 or start + _CHUNK >= len(test):
                self._say(f"{name}: {min(start + _CHUNK, len(test))}/{len(test)} questions scored")

    def _path(self, name: str) -> Path:
        return self.folder / name / "scores.jsonl"

    def _lines(self, name: str) -> int:
        """Whole lines written; one cut short by a kill is removed."""
        path = self._path(name)
        if not path.is_file():
            return 0
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        return whole.count("\n")

    def _estimate(self, updates: int) -> None:
        """Time one update and one scoring of a few questions, and say what is left to do."""
        few = self.data.train[:2]
        rule, config = self._rule("step"), self.config(self.variants[0])
        learner = DiscriminatorLearner(
            create_discriminator(config, self.policy), self.policy, config
        )
        times = []
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            learner.update(*self._batch(few, rule))
            middle = time.perf_counter()
            traces = [trace for i, one in enumerate(few) for trace in one.traces(rule, i)]
            span_energies(learner.discriminator, self.policy, traces, self.options.token_budget)
            times.append((middle - started, time.perf_counter() - middle))
        size = tokens(few)
        train, score = times[-1][0] / size, times[-1][1] / size
        left = sum(self._lines(v.name) < len(self.data.test) for v in self.variants)
        per_variant = train * tokens(self.data.train) * self.options.epochs
        per_variant += score * tokens(self.data.test)
        whole = left * per_variant + score * tokens(self.data.test)
        self._say(
            f"{train * 1e3:.1f} ms a token of training, {score * 1e3:.1f} of scoring, "
            f"{torch.get_num_threads()} threads: about {per_variant / 60:.1f} minutes a variant, "
            f"{left} to do: {whole / 60:.0f} minutes"
        )

    def _settings(self) -> dict[str, Any]:
        kept = ("train", "test", "max_prompt", "max_completion", "batch", "epochs",
                "learning_rate", "score_learning_rate", "lm_learning_rate",
                "precision")  # fmt: skip
        return {key: getattr(self.options, key) for key in kept}

    def _keep_settings(self) -> None:
        """Refuse to mix two settings in one folder."""
        path = self.folder / "settings.json"
        if path.is_file() and json.loads(path.read_text()) != self._settings():
            raise ValueError(
                f"{path}: expected the settings that the folder was started with, "
                f"{path.read_text().strip()}, received {json.dumps(self._settings())}; give those, "
                "or another --output"
            )
        path.write_text(json.dumps(self._settings()) + "\n")

    def _say(self, text: str) -> None:
        print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.mmlu_pro",
        description="Experts' and others' answers to MMLU-Pro: what does a discriminator learn?",
        epilog="Stopped at any moment, the same command goes on.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="questions.jsonl(.gz) and the models' answers")
    add("--model", required=True, help="SmolLM2-135M-Instruct: hub name or folder")
    add("--output", type=Path, default=Path("runs/mmlu_pro"), help="default: %(default)s")
    add("--train", type=int, default=64, help="questions to train on (default: %(default)s)")
    add("--test", type=int, default=128, help="held-out questions (default: %(default)s)")
    add("--max-prompt", type=int, default=160, help="tokens (default: %(default)s)")
    add("--max-completion", type=int, default=96, help="tokens (default: %(default)s)")
    add("--seeds", type=int, default=3, help="seeds of each variant (default: %(default)s)")
    add("--heads", nargs="+", choices=HEADS, default=HEADS)
    add("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    add("--batch", type=int, default=4, help="questions of an update (default: %(default)s)")
    add("--epochs", type=int, default=1, help="default: %(default)s")
    add("--learning-rate", type=float, default=5e-4, help="default: %(default)s")
    add(
        "--score-learning-rate",
        type=float,
        default=3e-4,
        help="of the score head's row; at 1e-2 f swings by units an update (default: %(default)s)",
    )
    add(
        "--lm-learning-rate",
        type=float,
        default=1e-2,
        help="of the lm head's scale and offset (default: %(default)s)",
    )
    add("--token-budget", type=int, default=4096, help="default: %(default)s")
    add(
        "--precision",
        choices=("highest", "high", "medium"),
        default="high",
        help="of float32 products, as torch.set_float32_matmul_precision (default: %(default)s, on "
        "AMX three bfloat16 products instead of six)",
    )
    add("--threads", type=int, help="CPU threads (default: torch's own)")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(options.precision)
    try:
        Study(options).run()
    except ValueError as error:
        print(f"studies.mmlu_pro: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_float32_matmul_precision(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
