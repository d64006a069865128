"""Runs on arithmetic of a few steps, and a trainer that keeps what it has seen."""

import torch

from airl_fast.config import load_config
from airl_fast.trainer import Trainer

TINY = [
    "run.steps=2",
    "run.threads=1",
    "run.eval_every=0",
    "run.checkpoint_every=100",
    "algorithm.sft_warmup=1",
    "algorithm.sft_batch=3",
    "discriminator.warmup_updates=1",
    "discriminator.perturbed_per_update=2",
    "sampling.prompts_per_step=4",
    "sampling.group_size=2",
    "sampling.max_new_tokens=10",
    "task.demonstrations=8",
    "task.unlabelled=6",
    "task.validation=4",
    "task.test=0",
]
LORA = ["policy.lora_rank=2", "discriminator.lora_rank=2"]
SHARED = [*LORA, "discriminator.trunk=shared"]
SHAPED = ["discriminator.head=score", "discriminator.shaping=true"]
OWN_TRUNK = ["discriminator.head=score", "discriminator.trunk=policy"]
WGAN = ["discriminator.logit=wgan", "discriminator.label_smoothing=0", "algorithm.reward=f"]


def make_config(folder, *overrides):
    return load_config("arithmetic", [*TINY, f"run.output_dir={folder}", *overrides])


def bits(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def everything(trainer):
    """Every parameter of both models, trained or not."""
    found = {f"policy.{n}": p for n, p in trainer.policy.model.named_parameters()}
    if trainer.discriminator is not None:
        found |= {f"disc.{n}": p for n, p in trainer.discriminator.named_parameters()}
    return bits(found)


def changed(before, after):
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same(before, after):
    assert changed(before, after) == set()


class Watched(Trainer):
    """A trainer that keeps its weights after every step and what its learners were given."""

    def __init__(self, config, **options):
        super().__init__(config, on_step=self._watch, **options)
        self.weights = [everything(self)]
        self.given = {"sft": [], "policy": [], "discriminator": []}
        for name, learner in (
            ("sft", self.sft_learner),
            ("policy", self.policy_learner),
            ("discriminator", self.disc_learner),
        ):
            if learner is not None:
                learner.update = self._keeping(name, learner.update)

    def _watch(self, metrics):
        self.weights.append(everything(self))

    def _keeping(self, name, update):
        def keep(*arguments):
            self.given[name].append(arguments)
            return update(*arguments)

        return keep


class StoppedError(Exception):
    """Stands for a kill."""


def stop_at(step):
    def stop(metrics):
        if metrics["step"] == step:
            raise StoppedError

    return stop


def without_seconds(metrics):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]
