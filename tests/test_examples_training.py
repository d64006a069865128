import importlib.util
import math
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_on_your_json_lines.py"


def test_training_on_json_lines_gives_a_reward_that_prefers_the_right_answer(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("train_on_your_json_lines", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    right, wrong = example.main(tmp_path)
    assert math.isfinite(right)
    assert right > wrong
    assert "#### 8" in capsys.readouterr().out
    assert (tmp_path / "run" / "reward").is_dir()
