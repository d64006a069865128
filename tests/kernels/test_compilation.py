"""A representative part of `python -m airl_fast.kernels.compilation`; the command does the rest."""

import os
import subprocess
import sys

import pytest

REPRESENTATIVE = {
    "the largest tiles": ("90", "split bf16 128x256x64 capped entropy"),
    "the policy loss": ("80", "policy fp32>bf16 4096 capped"),
    "a scan": ("90", "scan fp32 1x1024 forwards"),
    "the discriminator": ("80", "sums fp32 airl"),
}


@pytest.mark.parametrize("part", REPRESENTATIVE)
def test_compiles_without_spills(part):
    """In a process of its own, because interpreted kernels cannot be compiled."""
    arch, only = REPRESENTATIVE[part]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "airl_fast.kernels.compilation", "--arch", arch]
    done = subprocess.run(
        [*command, "--only", only], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


def test_a_filter_that_matches_nothing_fails():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "airl_fast.kernels.compilation", "--only", "no such kernel"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 2
