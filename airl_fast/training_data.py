"""The prompts, demonstrations and negatives of a run, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from airl_fast.batches import (
    Problem,
    Replay,
    Shuffled,
    TraceMaker,
    check_lengths,
    derive_seed,
    encode,
)
from airl_fast.config import RunConfig
from airl_fast.distributed import World
from airl_fast.packing import Trace
from airl_fast.policy import Policy
from airl_fast.spans import span_rule
from airl_fast.tasks import Task


class TrainingData:
    """What the steps of a run are given, beside what the policy samples.

    Args:
        config: the run's.
        task: gives the examples.
        policy: whose tokenizer encodes them, and whose context they have to fit.

    Attributes:
        maker: makes traces of problems, cut at the run's granularity.
        validation: the validation problems.
        shown: prompts of a step that have a demonstration; those come first.

    Raises:
        ValueError: an example that would not fit, or a demonstration that cannot be made wrong.
    """

    def __init__(self, config: RunConfig, task: Task, policy: Policy) -> None:
        seed, tokenizer = config.run.seed, policy.tokenizer
        rule = span_rule(
            config.algorithm.granularity,
            interval=config.algorithm.interval,
            boundary=task.step_boundary,
            tokenizer=tokenizer,
        )
        self.config = config
        self.maker = TraceMaker(task, tokenizer, rule, config.discriminator.perturbations)
        self._demonstrated = Shuffled(encode(task.train, tokenizer), seed, "demonstrated")
        self._unlabelled = Shuffled(encode(task.unlabelled, tokenizer), seed, "unlabelled")
        self.validation = encode(task.validation, tokenizer)
        if config.algorithm.name == "airl" and config.discriminator.perturbed_per_update:
            self.maker.check_perturbable(task.train)
        for problems in (self._demonstrated.items, self._unlabelled.items, self.validation):
            check_lengths(
                problems,
                max_new_tokens=config.sampling.max_new_tokens,
                token_budget=config.run.token_budget,
                context=policy.context,
            )
        self.shown = config.shown_prompts

    @property
    def demonstrated_length(self) -> float | None:
        """Mean length of the demonstrations, in tokens; None without any."""
        lengths = [len(p.expert) for p in self._demonstrated.items if p.expert]
        return sum(lengths) / len(lengths) if lengths else None

    def check_same(self, world: World) -> None:
        """Refuse to go on where the processes hold different data.

        Raises:
            ValueError: naming what differs, on all of them.
        """
        for what, items in (
            ("demonstrations", self._demonstrated.items),
            ("prompts", self._unlabelled.items),
            ("validation problems", self.validation),
        ):
            few = [items[i] for i in (0, -1) if len(items)]  # of a large file these are enough
            held = items if isinstance(items, list) else (len(items), few)
            world.check_same(what, held)

    def demonstrations(self, step: int) -> list[Trace]:
        """The demonstrations of a step of the warm start."""
        size = self.config.algorithm.sft_batch
        problems = self._demonstrated.take(step * size, size)
        return [self.maker.expert(problem, i) for i, problem in enumerate(problems)]

    def problems(self, step: int, unlabelled: bool) -> list[Problem]:
        """Prompts with demonstrations, then, if asked for, prompts without."""
        problems = self._demonstrated.take(step * self.shown, self.shown)
        rest = self.config.sampling.prompts_per_step - self.shown
        if unlabelled and rest:
            problems += self._unlabelled.take(step * rest, rest)
        return problems

    def experts(self, problems: Sequence[Problem]) -> list[Trace]:
        """The demonstrations of a step's prompts."""
        return [self.maker.expert(problems[i], i) for i in range(self.shown)]

    def negatives(
        self, problems: Sequence[Problem], traces: Sequence[Trace], step: int, replay: Replay
    ) -> list[Trace]:
        """Samples of earlier steps, and demonstrations made wrong.

        Args:
            problems: the step's.
            traces: what the policy has sampled for them.
            step: finished steps.
            replay: what it sampled before.
        """
        config, seed = self.config.discriminator, self.config.run.seed
        seed = derive_seed(seed, "negatives", step)
        fresh = [trace for trace in traces if trace.group < self.shown]
        replayed = replay.draw(round(config.replay_fraction * len(fresh)), seed)
        perturbed = [
            self.maker.perturbed(problems[i % self.shown], i % self.shown, seed + i)
            for i in range(config.perturbed_per_update)
        ]
        return [*replayed, *perturbed]
