"""Between micro-batches the CPU asks for no numbers: while a GPU goes backward it packs the next.

Operators over the head wait once themselves, for the number of rows that are not ignored, before
they do their work (tests/robustness/test_bounds.py); nothing here sees that.
"""

import random

import pytest
import torch

from airl_fast.config import load_config
from airl_fast.packing import Source, Trace
from airl_fast.passes import action_logp, span_energies
from airl_fast.planning import plan_traces
from airl_fast.trainer import Trainer
from tests.gpu.waits import Waits
from tests.tiny_run import SMALL


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waits")
    return Trainer(load_config("arithmetic", [*SMALL, f"run.output_dir={folder}"]))


@pytest.fixture(scope="module")
def traces():
    draw = random.Random(0)
    return [
        Trace(
            prompt=tuple(draw.choices(range(5, 15), k=6 + i % 3)),
            completion=tuple(draw.choices(range(5, 15), k=length)),
            span_lengths=(2, length - 2),
            group=i,
            source=Source.EXPERT if i % 2 else Source.POLICY,
        )
        for i, length in enumerate(draw.choices(range(4, 12), k=24))
    ]


def counted(call):
    call()  # whatever is made once is there
    with Waits() as waits:
        call()
    return waits.made.total()


def passes(traces, budget):
    return len(plan_traces(traces, budget, ranks=1))


def check(call, traces):
    """However many forward passes ``call(budget)`` takes, the CPU waits as often."""
    few, many = passes(traces, 4096), passes(traces, 64)
    assert many >= few + 4
    extra = counted(lambda: call(64)) - counted(lambda: call(4096))
    assert extra == 0


def test_updates_of_the_policy(trainer, traces):
    advantages = [torch.ones(len(t.completion), device=trainer.policy.device) for t in traces]
    learner = trainer.policy_learner

    def update(budget):
        learner.token_budget = budget
        assert learner.update(traces, advantages)["policy/grad_norm"] > 0

    check(update, traces)


def test_updates_of_the_discriminator(trainer, traces):
    learner = trainer.disc_learner
    logp = action_logp(trainer.policy, traces, 4096)

    def update(budget):
        learner.token_budget = budget
        assert learner.update(traces, logp)["disc/grad_norm"] > 0

    check(update, traces)


def test_passes_without_gradients(trainer, traces):
    check(lambda budget: action_logp(trainer.policy, traces, budget), traces)
    check(
        lambda budget: span_energies(trainer.discriminator, trainer.policy, traces, budget), traces
    )
