"""The numbers of a study and its page, from results that nobody ran."""

import json
import re
import statistics

import numpy as np
import pytest

from airl_fast.study.cells import plan
from airl_fast.study.page import write_page
from airl_fast.study.results import collect, difference
from airl_fast.study.spec import BEST_SFT, load_study
from tests.tiny_study import changed, made


def write_result(cell, result):
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "result.json").write_text(json.dumps({"seconds": 1.0, **result}))


def measured(sampled, greedy, best, **validation):
    return {"sampled": sampled, "greedy": greedy, "best": best, "temperature": 0.5,
            "validation": {"1": 0.1, **validation}}  # fmt: skip


@pytest.fixture
def invented(tmp_path):
    """Three seeds of results that nobody ran, with one variant's third missing."""
    study = load_study(made(tmp_path, changed(("seeds: [0]", "seeds: [0, 1, 2]"))))
    cells = plan(study, tmp_path / "out")
    rng = np.random.default_rng(0)
    for cell in cells:
        draw = [(rng.random(6) < 0.5).astype(float).tolist() for _ in range(3)]
        if cell.kind == "start":
            good = measured([1.0] * 6, [1.0] * 6, [1.0] * 6, **{"0.5": 0.3})
            other = measured(*draw, **{"0.5": 0.9})  # best on validation, not on test
            chosen = dict.fromkeys(("greedy", "sampled"), "arithmetic-base")
            write_result(cell, {"chosen": chosen, "methods": {"base": good, "SFT": good,
                                "SFT chosen at T = 1": other}})  # fmt: skip
        elif cell.kind == "variant" and (cell.name, cell.seed) != ("GRPO", 2):
            uses = {}
            if cell.name != "GRPO":
                uses = {
                    "rerank": {"random pick": [0.25] * 6, "majority vote": draw[0],
                               "log pi": draw[1], "f": draw[2], "oracle": [1.0] * 6},
                    "locate": {"log pi": draw[0], "f": draw[1]},
                    "auc": {"log pi": 0.5, "f": 0.5 + cell.seed / 10}, "chance": 0.25,
                }  # fmt: skip
            curves = {"valid/pass@1": [[0, 0.1 * cell.seed], [5, 0.5], [9, 0.6]],
                      "valid/kl": [[0, 0.0], [5, 1.0 + cell.seed], [9, 5.0]]}  # fmt: skip
            if cell.name == "GRPO":  # no reward is trained before the policy moves
                curves = {key: points[1:] for key, points in curves.items()}
            write_result(cell, {"measured": measured(*draw), "curves": curves, **uses})
    return study, cells, tmp_path / "out"


def test_means_spreads_and_differences(invented):
    study, cells, _ = invented
    results = collect(study, cells)
    names = [row.name for row in results.rows]
    assert names == ["base", "SFT", "SFT chosen at T = 1", BEST_SFT, "AIRL", "taken over", "GRPO"]
    at = {row.name: row for row in results.rows}
    of = {(c.name, c.seed): c.result() for c in cells if c.done and c.kind == "variant"}
    airl = [np.mean(of["AIRL", seed]["measured"]["sampled"]) for seed in range(3)]
    shown = [np.mean(v) for v in at["AIRL"].readings["sampled"].values()]
    assert shown == pytest.approx(airl)
    # Chosen by validation, though the other is right on every test problem.
    assert at[BEST_SFT].readings == at["SFT chosen at T = 1"].readings
    pairs = {(d.first, d.second, d.reading): d for d in results.differences}
    assert len(pairs) == 2 * 3
    grpo = pairs["GRPO", "AIRL", "T = 1"]
    by_seed = [
        np.mean(of["GRPO", s]["measured"]["sampled"])
        - np.mean(of["AIRL", s]["measured"]["sampled"])
        for s in (0, 1)
    ]
    assert list(grpo.by_seed.values()) == pytest.approx(by_seed)
    assert grpo.found.difference == pytest.approx(np.mean(by_seed))
    assert grpo.found.low <= grpo.found.difference <= grpo.found.high
    curve = at["AIRL"].curves["valid/pass@1"]
    assert curve[0] == (0, pytest.approx(0.1), 0.0, pytest.approx(0.2))
    assert at["AIRL"].curves["valid/kl"][1] == (5, 2.0, 1.0, 3.0)
    # It begins at what was measured of the start, at temperature 1.
    assert [point[0] for point in at["GRPO"].curves["valid/pass@1"]] == [0, 5, 9]
    assert at["GRPO"].curves["valid/pass@1"][0][1:] == pytest.approx((0.1, 0.1, 0.1))
    assert at["GRPO"].curves["valid/kl"][0] == (0, 0.0, 0.0, 0.0)


def test_what_was_measured_at_the_start_and_the_end_alone_is_not_drawn(invented, tmp_path):
    study, cells, folder = invented
    for cell in cells:
        if cell.done and cell.kind == "variant":
            found = cell.result()
            ends = {k: [p for p in v if p[0] != 5] for k, v in found["curves"].items()}
            write_result(cell, found | {"curves": ends})
    page = tmp_path / "mine.md"
    write_page(folder, "mine", "About it.", study, collect(study, cells), {}, page)
    assert page.read_text() == (folder / "results.md").read_text()
    assert not page.with_suffix("").exists()
    assert "against KL" not in (folder / "report.html").read_text()


def test_verdicts_follow_the_interval():
    ones, zeros = {0: [1.0] * 9, 1: [1.0] * 9}, {0: [0.0] * 9, 1: [0.0] * 9}
    assert difference("a", "b", "", ones, zeros).verdict == "above"
    assert difference("a", "b", "", zeros, ones).verdict == "below"
    mixed = {0: [0.0, 1.0] * 4, 1: [1.0, 0.0] * 4}
    half = {0: [0.5] * 8, 1: [0.5] * 8}
    assert difference("a", "b", "", mixed, half).verdict == "not told apart"
    assert difference("a", "b", "", {0: [1.0]}, {1: [1.0]}) is None


def test_the_page_has_the_tables_the_spread_and_what_failed(invented, tmp_path, capsys):
    study, cells, folder = invented
    results = collect(study, cells)
    failed = {"seed 2: GRPO": "OSError: disk full (somewhere)"}
    page = tmp_path / "docs" / "mine.md"
    write_page(folder, "mine", "About it.", study, results, failed, page)
    text = (folder / "results.md").read_text()
    assert "About it." in text
    assert "seed 2: GRPO: OSError: disk full" in text
    values = [np.mean(c.result()["measured"]["greedy"])
              for c in cells if c.name == "AIRL" and c.kind == "variant"]  # fmt: skip
    assert f"{np.mean(values):.3f} ± {statistics.stdev(values):.3f}" in text
    assert "AUC of f" in text
    assert "0.600 ± 0.100" in text  # of 0.5, 0.6, 0.7
    assert page.read_text().startswith(text)
    plots = re.findall(r"^!.*\]\(([^()]*)\)$", page.read_text(), re.M)
    assert plots
    assert all((page.parent / plot).is_file() for plot in plots)
    data = json.loads((folder / "results.json").read_text())
    assert {row["name"] for row in data["rows"]} >= {"AIRL", BEST_SFT}
    report = (folder / "report.html").read_text()
    assert "pass@1 against KL" in report
    assert "AIRL" in capsys.readouterr().out
