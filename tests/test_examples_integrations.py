"""The examples that plug into other trainers, run as a reader would."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_trainer_learns(capsys):
    spec = importlib.util.spec_from_file_location("own_trainer", EXAMPLES / "own_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rewards = module.main(steps=30)
    assert sum(rewards[:3]) / 3 < 0.45  # a quarter of all tokens, and noise
    assert sum(rewards[-5:]) / 5 > 0.7
    assert "step 29: reward" in capsys.readouterr().out


def test_trl_grpo():
    pytest.importorskip("trl", reason="the trl extra is not installed")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "trl_grpo.py"), "--steps", "1"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GRPOTrainer mean reward per step: [" in done.stdout
    assert "DenseGRPOTrainer mean reward per step: [" in done.stdout
