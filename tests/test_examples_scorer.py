"""The example runs as it stands."""

import importlib.util
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run  # noqa: F401

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "score_and_rerank.py"


def test_score_and_rerank(tiny_run, capsys):  # noqa: F811
    if not EXAMPLE.is_file():
        pytest.skip("examples are in the repository, not in the package")
    spec = importlib.util.spec_from_file_location("score_and_rerank", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tiny_run)
    out = capsys.readouterr().out
    assert "majority: answer 78, weight 0.66" in out
    assert "lowest: step 1, '72+2=75;'" in out
    assert "24 traces, 12 with an error" in out
    assert "per token, for a policy" in out
