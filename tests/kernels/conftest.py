"""The kernels run compiled where there is a GPU, else in Triton's interpreter (tests/conftest.py).

Without either (TRITON_INTERPRET=0 and no GPU) these tests have nothing to run on.
"""

import os

import pytest
import torch

import airl_fast


@pytest.fixture(scope="session")
def device():
    """Where the kernels run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 set before triton is imported")


@pytest.fixture
def triton_backend(device, monkeypatch):
    """Every operator in the test runs on this backend or raises, and refuses bad values at once."""
    monkeypatch.setenv("AIRL_FAST_BLOCKING", "1")
    with airl_fast.backend("triton"):
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh floating buffers hold NaN, so that an element that is never written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k))
    )
