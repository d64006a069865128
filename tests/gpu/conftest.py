"""Without a GPU these tests are skipped; tests/test_stand_in.py runs them on the stand-in."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or the stand-in for one"))
