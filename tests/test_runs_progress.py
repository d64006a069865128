"""What is said of runs in other processes, where there is no terminal."""

import json
from concurrent.futures import Future

from airl_fast.config import load_config
from airl_fast.runs_progress import RunsProgress


def test_a_line_for_what_has_moved(tmp_path, capsys):
    config = load_config("arithmetic", [f"run.output_dir={tmp_path}", "run.steps=3"])
    future = Future()
    bars = RunsProgress()
    bars.follow("a run", config, future)

    def said(*metrics):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(step) + "\n" for step in metrics)
        bars._look(say=True)
        return capsys.readouterr().out

    total = config.total_steps
    assert said() == ""  # it waits
    future.set_running_or_notify_cancel()
    assert said() == f"a run: 0/{total} running\n"
    assert said() == ""
    step = {"phase": "policy", "reward/mean": 0.5}
    assert said(step) == f"a run: 1/{total} policy: reward 0.500\n"
    assert said(step) == f"a run: 2/{total} policy: reward 0.500\n"
    future.set_result(None)
    assert said() == f"a run: {total}/{total} done\n"
    assert said() == ""
