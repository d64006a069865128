"""The loop: sample, tell experts from policy, reward, improve the policy.

AIRL (Fu et al. 2018, arXiv 1710.11248; on reasoning traces arXiv 2510.01857) with the
discriminator D = sigmoid(f - log pi). SFT and GRPO with the true outcome run through the same
loop with other rewards, and serve as baselines. A run has three phases: an SFT warm start, the
discriminator alone, then both. It goes on from its last checkpoint with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from airl_fast.advantages import token_advantages
from airl_fast.audit import Audit
from airl_fast.batches import Problem, derive_seed
from airl_fast.building import create_discriminator, load_policy
from airl_fast.config import RunConfig, check_is_config
from airl_fast.discriminator import Discriminator
from airl_fast.distributed import World, gathered, join
from airl_fast.guards import Guards
from airl_fast.learners import (
    DiscriminatorLearner,
    Metrics,
    PolicyLearner,
    combine_logp,
)
from airl_fast.optimisation import Optimiser
from airl_fast.packing import Source, Trace
from airl_fast.passes import action_logp, offsets, per_trace_sum, span_energies
from airl_fast.policy import Policy
from airl_fast.recompute import recompute_layers
from airl_fast.rollout import Rollout, largest_mismatch, sample, summarise
from airl_fast.run_folder import RunFolder, write_models
from airl_fast.tasks import Task, load_task
from airl_fast.training_data import TrainingData
from airl_fast.validation import (
    Samples,
    outcome_rewards,
    sample_validation,
    traces_of,
    validate,
)
from airl_fast.weights import copy_parameters, swapped

SFT, DISCRIMINATOR, BOTH = "sft", "discriminator", "policy"


class Trainer:
    """One run of AIRL or of a baseline.

    Args:
        config: everything that the run depends on.
        task: instead of the one that ``config.task`` names.
        policy: instead of loading ``config.policy``; trained in place.
        discriminator: instead of making one from ``config.discriminator``; trained in place.
        world: the processes that share the run; by default those that torchrun started. All of
            them make the same trainer.
        on_step: called after every step with its metrics (a progress display).
        should_stop: called once after every step; where it is true, the step is saved and the run
            ends there, to go on another time (``stopping.StopSignals``).

    Attributes:
        policy, discriminator: the models; no discriminator for a baseline.
        step, total_steps: how many steps are done, and how many there are.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        task: Task | None = None,
        policy: Policy | None = None,
        discriminator: Discriminator | None = None,
        world: World | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_is_config(config)
        self.world = world or join(config.run.device)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        if config.run.matmul_precision is not None:
            torch.set_float32_matmul_precision(config.run.matmul_precision)
        self.config = config
        self.task = task or load_task(config.task)
        self.policy = policy or load_policy(config, self.world.device)
        self.discriminator = None
        if config.algorithm.name == "airl":
            self.discriminator = discriminator or create_discriminator(config, self.policy)
        given = discriminator, config.discriminator.model, config.discriminator.saved
        self._starts_as_policy = all(one is None for one in given)
        if config.run.gradient_checkpointing:
            recompute_layers(self.policy)
            if self.discriminator is not None and self.discriminator.body is not None:
                recompute_layers(self.discriminator.body)
        self.on_step = on_step
        self.should_stop = should_stop

        self.sft_steps, self.total_steps = config.sft_steps, config.total_steps
        self.step = 0
        self._unmoved: Samples | None = None
        self.data = TrainingData(config, self.task, self.policy)
        self._share()
        self._prepare_learners()
        self.folder = RunFolder(config)
        models = self.policy, self.discriminator
        length = self.data.demonstrated_length
        self.guards = Guards(config, self.folder.path, *models, demonstrated_length=length)
        self.audit = Audit(config)

    def train(self) -> list[dict[str, Any]]:
        """Run to the end, from the last checkpoint if there is one; return every step's metrics.

        Where ``should_stop`` ended it before, ``step`` is less than ``total_steps`` and no final
        weights are written.

        Raises:
            ValueError: the folder holds another run, or one that may not go on.
            WriteError, CheckpointError: the folder cannot be written to, or is damaged.
        """
        self._resume()
        while self.step < self.total_steps:
            started = time.perf_counter()
            phase = self._phase(self.step)
            metrics = self.guards.step(self._make_step, self.step, phase)
            self.step += 1
            metrics["seconds"] = time.perf_counter() - started
            self._evaluate(metrics)
            stopping = any(self.world.gather(self.should_stop()))
            self._record({"step": self.step, "phase": phase, **metrics}, save=stopping)
            if stopping and self.step < self.total_steps:
                return self.world.first_does(self.folder.history)
        self.save()
        return self.world.first_does(self.folder.history)

    def _make_step(self, step: int) -> Metrics:
        phase = self._phase(step)
        return self._sft_step(step) if phase == SFT else self._adversarial_step(step, phase)

    def _sft_step(self, step: int) -> Metrics:
        """Imitation: the policy-gradient loss with advantage one on the demonstrations."""
        traces = self.data.demonstrations(step)
        self.guards.saw(traces)
        ones = [torch.ones(len(trace.completion), device=self.policy.device) for trace in traces]
        metrics = self.audit.policy(step, self.sft_learner, traces, ones)
        metrics |= self.sft_learner.update(traces, ones)
        metrics["policy/loss"] = -metrics["policy/logp"]  # with advantage one the loss reads -1
        return metrics

    def _adversarial_step(self, step: int, phase: str) -> Metrics:
        """Sample; update the discriminator; reward with the fresh f; update the policy."""
        if step == self.sft_steps:
            self._end_sft()
        algorithm, size = self.config.algorithm, self.config.sampling.group_size
        problems = self.data.problems(step, phase == BOTH)
        sampled = phase == BOTH or self.config.discriminator.warmup_samples
        rollouts = self._sample(problems, step) if sampled else []
        traces = [
            self.data.maker.trace(problems[i // size], rollout.completion, Source.POLICY, i // size)
            for i, rollout in enumerate(rollouts)
        ]
        metrics = summarise(rollouts)
        learner = self.disc_learner
        experts = self.data.experts(problems) if learner or algorithm.expert_in_group else []
        negatives = self.data.negatives(problems, traces, step, learner.replay) if learner else []
        everything = [*traces, *experts, *negatives]
        self.guards.saw(everything)
        logp = self._logp(everything)
        self.guards.saw(everything, logp)
        if rollouts:
            metrics["sampler_mismatch"] = largest_mismatch(rollouts, logp[: len(rollouts)])

        if learner is not None:
            # Samples of prompts without a demonstration are left out: f would learn to tell the
            # prompts apart.
            shown = self.data.shown
            seen = [i for i, trace in enumerate(everything) if trace.group < shown]
            contrast, contrast_logp = [everything[i] for i in seen], [logp[i] for i in seen]
            for _ in range(self.config.discriminator.updates_per_step):
                metrics |= learner.update(contrast, contrast_logp)
            learner.replay.add([trace for trace in traces if trace.group < shown])
        if self.discriminator is not None:
            models = self.discriminator, self.policy
            metrics |= self.audit.discriminator(step, *models, everything, logp)
        if phase == DISCRIMINATOR:
            return metrics

        if algorithm.expert_in_group:
            traces += experts
        logp = logp[: len(traces)]
        rewards = self._rewards(problems, traces, logp, metrics)
        advantages = self._advantages(traces, rewards, metrics)
        self.guards.advantages(advantages)
        old_logp = logp if algorithm.policy_updates > 1 else None
        ref_logp = self._reference_logp(traces) if algorithm.kl_beta else None
        given = traces, advantages, old_logp, ref_logp
        metrics |= self.audit.policy(step, self.policy_learner, *given)
        for _ in range(algorithm.policy_updates):
            metrics |= self.policy_learner.update(*given)
        return metrics

    # What a step is made of

    def _phase(self, step: int) -> str:
        if step < self.sft_steps:
            return SFT
        return DISCRIMINATOR if step < self.sft_steps + self.config.warmup_steps else BOTH

    def _sample(self, problems: Sequence[Problem], step: int) -> list[Rollout]:
        sampling = self.config.sampling
        return sample(
            self.policy,
            [problem.prompt for problem in problems],
            group_size=sampling.group_size,
            max_new_tokens=sampling.max_new_tokens,
            seed=derive_seed(self.config.run.seed, "rollouts", step),
            temperature=sampling.temperature,
            stop=sampling.stop,
        )

    def _rewards(
        self,
        problems: Sequence[Problem],
        traces: Sequence[Trace],
        logp: Sequence[Tensor],
        metrics: Metrics,
    ) -> Tensor:
        """The reward of every span of every trace, [S]: f, f - log pi, or the true outcome."""
        if self.discriminator is None:
            asked = [problems[trace.group] for trace in traces]
            reward = outcome_rewards(self.policy, self.task, asked, traces)
        else:
            budget = self.config.run.token_budget
            with self._scoring():
                reward = torch.cat(span_energies(self.discriminator, self.policy, traces, budget))
            if self.config.algorithm.reward == "f-logp":
                spans = offsets([n for t in traces for n in t.span_lengths], reward.device)
                how = self.config.discriminator.span_logp
                reward = reward - combine_logp(torch.cat(list(logp)), spans, how)
        metrics["reward/mean"] = float(reward.mean())
        self.guards.rewards(reward, metrics["reward/mean"])
        metrics["reward/std"] = float(reward.std(correction=0))
        return _clipped(reward, self.config.algorithm.reward_clip, "reward/clipped", metrics)

    def _advantages(
        self, traces: Sequence[Trace], rewards: Tensor, metrics: Metrics
    ) -> list[Tensor]:
        """The advantage of every action of every trace.

        An outcome is one number per trace: counting members that have ended as 0 at a later span
        would hold a right but shorter answer against the longer ones, so it is compared whole.
        """
        algorithm = self.config.algorithm
        level = algorithm.advantage_level if self.discriminator is not None else "sequence"
        values = token_advantages(
            rewards,
            cu_spans=offsets([n for t in traces for n in t.span_lengths], rewards.device),
            cu_seq_spans=offsets([len(t.span_lengths) for t in traces], rewards.device),
            group=torch.tensor([t.group for t in traces], device=rewards.device),
            gamma=algorithm.gamma,
            baseline=algorithm.baseline,
            scale=algorithm.scale,
            level=level,
        )
        values = _clipped(values, algorithm.advantage_clip, "advantage/clipped", metrics)
        return list(values.split([len(t.completion) for t in traces]))

    def _logp(self, traces: Sequence[Trace]) -> list[Tensor]:
        run, sampling = self.config.run, self.config.sampling
        return action_logp(self.policy, traces, run.token_budget, sampling.temperature)

    def _reference_logp(self, traces: Sequence[Trace]) -> list[Tensor]:
        with swapped(self.policy, self.reference):
            return self._logp(traces)

    # Before, between and after the steps

    def _share(self) -> None:
        """Cut the models in pieces among the processes, which have to hold the same so far."""
        self.world.check_same("configuration", self.config)
        self.data.check_same(self.world)
        self.policy.shard(self.world)
        if self.discriminator is not None:
            self.discriminator.shard(self.policy)

    def _prepare_learners(self) -> None:
        config, policy, algorithm = self.config, self.config.policy, self.config.algorithm

        def learner(rate: float, updates: int, *, imitation: bool) -> PolicyLearner:
            optimiser = Optimiser(
                self.policy.trainable(),
                learning_rate=rate,
                weight_decay=policy.weight_decay,
                betas=policy.betas,
                clip_norm=policy.clip_norm,
                warmup=policy.warmup_steps,
                updates=updates,
                final_fraction=policy.final_lr_fraction,
                world=self.world,
            )
            return PolicyLearner(self.policy, config, optimiser, imitation=imitation)

        self.sft_learner = learner(algorithm.sft_learning_rate, self.sft_steps, imitation=True)
        updates = config.run.steps * algorithm.policy_updates
        self.policy_learner = learner(policy.learning_rate, updates, imitation=False)
        self.disc_learner: DiscriminatorLearner | None = None
        if self.discriminator is not None and not algorithm.frozen_discriminator:
            self.disc_learner = DiscriminatorLearner(self.discriminator, self.policy, config)
        self.reference: dict[str, Tensor] = {}
        if self.sft_steps == 0:
            self._end_sft()

    def _end_sft(self) -> None:
        """The warm start is over: f starts from the policy as it is now, and so does the KL."""
        self.sft_learner.optimiser.retire()
        if self.discriminator is not None and self._starts_as_policy and self.sft_steps:
            self.discriminator.copy_body(self.policy)
        if self.disc_learner is not None:
            self.disc_learner.restart_average()
        if self.config.algorithm.kl_beta or self.config.run.eval_kl:
            trainable = self.policy.trainable()
            self.reference = {name: p.detach().clone() for name, p in trainable.items()}

    def _scoring(self) -> AbstractContextManager[None]:
        """Within it, f is what the learner has rewards made of."""
        return self.disc_learner.scoring() if self.disc_learner is not None else nullcontext()

    def _evaluate(self, metrics: Metrics) -> None:
        """pass@1 on validation problems; what f says of the samples; the KL from the start."""
        run = self.config.run
        due = run.eval_every and (
            self.step % run.eval_every == 0 or self.step in (self.sft_steps, self.total_steps)
        )
        if not due or not self.data.validation:
            return
        samples = self._validation_samples()
        traces = traces_of(samples, self.data.maker)
        with self._scoring():
            models = self.policy, self.discriminator
            metrics |= validate(samples, traces, *models, run.token_budget)
        if run.eval_kl and self.reference:
            own, start = per_trace_sum(self._logp(traces)), self._reference_logp(traces)
            metrics["valid/kl"] = (own - per_trace_sum(start)).mean().item()

    def _validation_samples(self) -> Samples:
        """Sampled once while f warms up: the policy is the same, and so is the seed."""
        if self._unmoved is not None and self._phase(self.step - 1) == DISCRIMINATOR:
            return self._unmoved
        samples = sample_validation(self.config, self.task, self.data, self.policy)
        stays = self._phase(self.step) == DISCRIMINATOR
        self._unmoved = samples if stays else None
        return samples

    def _record(self, metrics: dict[str, Any], *, save: bool) -> None:
        def recorded() -> bool:
            self.folder.record(metrics)
            return self.folder.best.improves(metrics)

        due = self.step % self.config.run.checkpoint_every == 0 or self.step == self.total_steps
        best = self.world.first_does(recorded)
        if best or due or save:
            self.save_checkpoint()
        if self.on_step is not None:
            self.on_step(metrics)

    def save_checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        tensors = {f"policy.{k}": p.detach() for k, p in self.policy.trainable().items()}
        tensors |= {f"reference.{k}": value for k, value in self.reference.items()}
        state = {}
        for name, learner in (("sft", self.sft_learner), ("policy", self.policy_learner)):
            part, state[name] = learner.optimiser.state(f"{name}_adamw")
            tensors |= part
        if self.disc_learner is not None:
            part, state["discriminator"] = self.disc_learner.state()
            tensors |= part
        elif self.discriminator is not None:
            trainable = self.discriminator.trainable()
            tensors |= {f"disc.{k}": p.detach() for k, p in trainable.items()}
        state["guards"] = self.guards.state()
        tensors = gathered(tensors, self.world)
        self.world.first_does(lambda: self.folder.save(self.step, tensors, state))

    def _resume(self) -> None:
        found = self.folder.open_together(self.world)
        if found is not None:
            self.restore(*found)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Set what ``save_checkpoint`` wrote."""
        copy_parameters(self.policy.trainable(), tensors, "policy.")
        self.sft_learner.optimiser.restore(tensors, state["sft"], "sft_adamw")
        if state["step"] > self.sft_steps:
            self.sft_learner.optimiser.retire()
        self.policy_learner.optimiser.restore(tensors, state["policy"], "policy_adamw")
        if self.disc_learner is not None:
            self.disc_learner.restore(tensors, state["discriminator"])
        elif self.discriminator is not None:
            copy_parameters(self.discriminator.trainable(), tensors, "disc.")
        prefix = "reference."
        self.reference = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        self.guards.restore(state.get("guards"))
        self.step = state["step"]

    def save(self, folder: Path | None = None) -> None:
        """Write the weights, whole or not at all: DIR/policy and, where there is one, DIR/reward.

        Args:
            folder: DIR; by default the run's.

        Raises:
            WriteError: it cannot be written to.
        """
        models = (self.policy, self.discriminator)
        with self._scoring():
            write_models(folder or self.folder.path, *models, self.config, self.task)


def _clipped(values: Tensor, limit: float | None, name: str, metrics: Metrics) -> Tensor:
    """The values within the limit, and in the metrics how many were outside it."""
    if limit is None:
        return values
    metrics[name] = float((values.abs() > limit).sum())
    return values.clamp(-limit, limit)
