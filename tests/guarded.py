"""Runs on arithmetic of a few steps whose guards are looked at."""

import json

import torch

from airl_fast.config import load_config
from airl_fast.trainer import Trainer

TINY = [
    "run.steps=3",
    "run.threads=1",
    "run.eval_every=0",
    "run.checkpoint_every=100",
    "algorithm.sft_warmup=0",
    "discriminator.warmup_updates=0",
    "discriminator.perturbed_per_update=2",
    "discriminator.replay=8",
    "discriminator.replay_fraction=0.5",
    "sampling.prompts_per_step=2",
    "sampling.group_size=2",
    "sampling.max_new_tokens=16",
    "task.demonstrations=8",
    "task.unlabelled=0",
    "task.validation=4",
    "task.test=0",
]
NAN, INF = float("nan"), float("inf")


def make_config(folder, *overrides):
    return load_config("arithmetic", [*TINY, f"run.output_dir={folder}", *overrides])


def snapshot(trainer):
    """All that a checkpoint would hold, but for the guards' own counts."""
    kept = {}

    def keep(step, tensors, state):
        kept["tensors"] = {name: tensor.clone() for name, tensor in tensors.items()}
        kept["state"] = json.loads(json.dumps({k: v for k, v in state.items() if k != "guards"}))

    own, trainer.folder.save = trainer.folder.save, keep
    trainer.save_checkpoint()
    trainer.folder.save = own
    return kept["tensors"], kept["state"]


def changed(before, after):
    """The kinds of tensors and values that differ."""
    assert before[0].keys() <= after[0].keys()
    names = {n for n, t in before[0].items() if not torch.equal(t, after[0][n])}
    names |= after[0].keys() - before[0].keys()
    names |= {n for n in before[1] if before[1][n] != after[1][n]}
    return {name.split(".")[0] for name in names}


class Kept(Trainer):
    """A trainer that keeps what a checkpoint would hold, before the first step and after each."""

    def __init__(self, config):
        super().__init__(config, on_step=lambda _: self.states.append(snapshot(self)))
        self.states = [snapshot(self)]


def bad_gradient(trainer, at, model):
    """The gradient of a parameter in the middle holds one infinity; returns its name."""
    parameters = {"policy": trainer.policy, "discriminator": trainer.discriminator}
    name = sorted(parameters[model].trainable())[7]

    def spoil(gradient):
        spoilt = gradient.clone()
        if trainer.step + 1 in at:
            spoilt.view(-1)[3] = INF
        return spoilt

    parameters[model].trainable()[name].register_hook(spoil)
    return name
