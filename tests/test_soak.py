"""The soak: slopes against planted leaks, rates, what is read of a run that is being written."""

import json
import math
import os

import numpy as np
import psutil
import pytest

from benchmarks import soak_page
from benchmarks.soak import _SERVE, _TRAIN, Log, Steps
from benchmarks.soak_fit import Quantity, fit, theil_sen

MEMORY = Quantity(name="memory", column="mib", unit="MiB", tolerance=10)
SPEED = Quantity(name="speed", column="cpu", per="steps", unit="s", tolerance=5, relative=True)


def samples(values, minutes=120.0):
    times = np.linspace(0, minutes, len(values))
    return [{"minutes": t, "mib": v} for t, v in zip(times, values, strict=True)]


def test_the_slope_is_the_median_of_all_slopes_and_its_interval_covers_the_truth():
    x = np.arange(9.0)
    assert theil_sen(x, 3 * x + 1) == (3, 3, 3)
    rng = np.random.default_rng(0)
    y = 2 * x + rng.normal(size=9)
    pairs = sorted((y[j] - y[i]) / (x[j] - x[i]) for i in range(9) for j in range(i + 1, 9))
    assert theil_sen(x, y)[0] == pytest.approx((pairs[17] + pairs[18]) / 2)
    x, covered = np.arange(60.0), 0
    for _ in range(200):
        _, low, high = theil_sen(x, 0.1 * x + rng.normal(size=60))
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 199  # 95% of 200, four standard deviations


def test_a_planted_leak_drifts_noise_is_flat_and_a_short_soak_cannot_tell():
    rng = np.random.default_rng(1)
    noise = rng.normal(scale=5, size=1400)
    flat = fit(samples(800 + noise), MEMORY)
    assert (flat.verdict, flat.blocks) == ("flat", 60)
    leak = fit(samples(800 + noise + np.linspace(0, 40, 1400)), MEMORY)  # 20 MiB an hour
    assert leak.verdict == "drifts"
    assert leak.slope == pytest.approx(20, abs=1)
    assert fit(samples(800 - np.linspace(0, 40, 1400)), MEMORY).verdict == "drifts"
    assert fit(samples(800 + noise[:30], minutes=1), MEMORY).verdict == "undecided"


def test_memory_that_swings_within_a_step_is_judged_by_its_lowest():
    rng = np.random.default_rng(2)
    swings = 780 + 120 * rng.random(1400)
    lowest = Quantity(name="lowest", column="mib", unit="MiB", tolerance=5, lowest=True)
    assert fit(samples(swings), lowest).verdict == "flat"
    assert fit(samples(swings + np.linspace(0, 40, 1400)), lowest).verdict == "drifts"


def test_a_pause_of_the_machine_moves_nothing():
    values = np.full(1400, 800.0)
    values[500:600] = 5000
    assert fit(samples(values), MEMORY).slope == 0


def test_a_rate_is_what_was_added_over_what_was_done():
    found = [{"minutes": i, "cpu": 7.0 * i, "steps": 2 * i} for i in range(121)]
    trend = fit(found, SPEED)
    assert (trend.median, trend.verdict) == (pytest.approx(3.5), "flat")
    slower = [{"minutes": i, "cpu": i + 0.001 * i * i, "steps": i} for i in range(121)]
    trend = fit(slower, SPEED)  # a step at minute i takes 1 + 0.002 i
    assert trend.slope == pytest.approx(100 * 0.12 / 1.12, rel=0.02)
    assert trend.verdict == "drifts"


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="expected 8 finite points or more, received 5: go longer"):
        fit(samples([1.0] * 5), MEMORY)
    with pytest.raises(ValueError, match="expected samples after the warm-up, received none"):
        fit([], MEMORY)


def test_only_finished_lines_are_read_and_each_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = Steps(path)
    assert steps.read(4)["steps"] == 0
    row = {"step": 1, "phase": "policy", "seconds": 2.0, "rollout/length": 50.0}
    path.write_text(json.dumps(row) + "\n" + '{"step": 2, "pha')
    read = steps.read(4)
    assert (read["steps"], read["kilotokens"], read["step_seconds"]) == (1, 0.2, 2.0)
    assert math.isnan(steps.read(4)["step_seconds"])
    row["step"] = 2
    path.write_text(json.dumps({**row, "step": 1}) + "\n" + json.dumps(row) + "\n")
    assert (steps.read(4)["steps"], steps.read(4)["kilotokens"]) == (2, 0.4)


def test_pauses_of_the_machine_are_counted(tmp_path):
    log = Log(tmp_path / "samples.csv")
    log.samples = [{"minutes": m} for m in (0.0, 0.1, 1.5, 1.6, 1.7, 4.0)]
    assert log.pauses(5) == 2


def test_a_log_sees_handles_that_are_left_open(tmp_path):
    log, process = Log(tmp_path / "samples.csv"), psutil.Process()
    log.add(process, {"steps": 1})
    left = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    log.add(process, {"steps": 2})
    for descriptor in left:
        os.close(descriptor)
    first, second = log.samples
    assert second["handles"] - first["handles"] == 3
    assert len(log.path.read_text().splitlines()) == 3


@pytest.mark.parametrize(("what", "quantities"), [("train", _TRAIN), ("serve", _SERVE)])
def test_the_page_says_what_drifts(tmp_path, what, quantities):
    pytest.importorskip("matplotlib")
    columns = {q.column for q in quantities} | {q.per for q in quantities if q.per}
    found = [dict.fromkeys(columns, 5.0 + i) | {"minutes": float(i)} for i in range(30)]
    trends = [fit(found, quantity) for quantity in quantities]
    environment = {"hardware": "a processor", "cores": 2, "date": "2026-01-01T00:00:00"}
    about = {"load_before": 0.1, "samples": 30, "warmup_minutes": 3.0, "pauses": 0}
    soak_page.write(tmp_path, what, found, trends, about, environment)
    text = (tmp_path / "results.md").read_text()
    assert "| resident memory | 19.5 MiB | +60 MiB an hour | +60 to +60 | 10 | drifts |" in text
    assert (tmp_path / "soak.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["trends"][0]["verdict"] == "drifts"
