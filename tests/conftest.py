"""Before any test module is imported: where there is no GPU, Triton's kernels are interpreted.

Triton reads TRITON_INTERPRET when it is first imported, and several test modules import packages
that import it. Nothing else is affected: in the interpreter the backend serves only when forced.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """Runs whose every step is saved: nothing here outlives a power cut."""
    monkeypatch.setattr("os.fsync", lambda file: None)
