"""``python -m tests.stand_in [PYTEST'S ARGUMENTS]``: run tests on the stand-in for a GPU."""

import os
import sys

import pytest

from tests.stand_in import ENVIRONMENT
from tests.stand_in.build import build

if __name__ == "__main__":
    try:
        os.environ[ENVIRONMENT] = str(build())
    except pytest.skip.Exception as why:
        sys.exit(f"tests.stand_in: {why}")
    plugin = ["-m", "pytest", "-p", "tests.stand_in.plugin"]
    os.execv(sys.executable, [sys.executable, *plugin, *sys.argv[1:]])
