"""The tests that need a GPU, on a stand-in for one: see tests/stand_in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stand_in.build import build

ROOT = Path(__file__).resolve().parent.parent
FILES = ("tests/gpu", "tests/cuda/test_on_gpu.py")
LARGE = ("128256", "248320", "32001", "1031")  # vocabularies; the emulator has a fiber per thread


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs them")
def test_on_the_stand_in():
    build()  # skips where it cannot be
    command = [sys.executable, "-m", "tests.stand_in", "-q", "-p", "no:cacheprovider", *FILES]
    command += ["-k", " and ".join(f"not {vocab}" for vocab in LARGE)]
    settings = {k: v for k, v in os.environ.items() if not k.startswith("AIRL_FAST_")}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
