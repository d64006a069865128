"""A run of a few steps on arithmetic, made once for all tests that need a finished one."""

from functools import cache
from pathlib import Path

import pytest

from airl_fast.config import load_config
from airl_fast.trainer import Trainer

SMALL = (
    "run.steps=2",
    "run.threads=1",
    "run.eval_every=2",
    "algorithm.sft_warmup=2",
    "discriminator.warmup_updates=2",
    "discriminator.perturbed_per_update=4",
    "sampling.prompts_per_step=4",
    "sampling.group_size=2",
    "sampling.temperature=0.8",
    "task.demonstrations=40",
    "task.unlabelled=40",
    "task.validation=8",
    "task.test=8",
)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; not to be written to."""
    return _made(tmp_path_factory.getbasetemp())


@cache  # a fixture that two files import is made twice
def _made(base: Path) -> Path:
    folder = base / "tiny-run"
    Trainer(load_config("arithmetic", [*SMALL, f"run.output_dir={folder}"])).train()
    return folder
