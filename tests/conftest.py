"""Before any test module is imported: one thread, and without a GPU Triton's kernels interpreted.

Triton reads TRITON_INTERPRET when it is first imported, and several test modules import packages
that import it. Nothing else is affected: in the interpreter the backend serves only when forced.
"""

import os
import signal
import threading

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On tiny tensors a second thread of an operation costs more than it brings.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)

# A shell's background job starts with SIGINT ignored, and so would every process of the tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and (
    threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """Runs whose every step is saved: nothing here outlives a power cut."""
    monkeypatch.setattr("os.fsync", lambda file: None)


# Workers take whole files: those of minutes first, or the last of them keeps the others waiting.
LONG = (
    "tests/test_stand_in.py",
    "tests/test_distributed.py",
    "tests/ops/test_cpu_rows.py",
    "tests/test_study_cells.py",
    "tests/test_continuing.py",
    "tests/test_trainer.py",
    "tests/test_audit.py",
    "tests/kernels",
)


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG))

    items.sort(key=place)
