"""``airl-fast study``: the file, the cells, what goes on after a stop or a failure, the numbers."""

import dataclasses
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from airl_fast import building, cli, jobs
from airl_fast.config import ConfigError
from airl_fast.measuring import choose_sft
from airl_fast.study import costs
from airl_fast.study.cells import Cell, cell_config, plan, run_cell, waiting_for
from airl_fast.study.page import write_page
from airl_fast.study.results import collect, difference
from airl_fast.study.spec import BEST_SFT, Study, description, load_study, studies, study_text

TINY = """\
# A study of seconds.
recipe: arithmetic
seeds: [0]
sft_arms: [[2.0e-4, 2], [1.0e-3, 2]]
sft_checkpoints: 2
temperatures: [1.0, 0.0]
samples: 2
rerank_samples: 3
curve_every: 1
overrides:
  - run.steps=3
  - run.eval_samples=2
  - run.checkpoint_every=1
  - algorithm.sft_batch=3
  - discriminator.warmup_updates=1
  - discriminator.perturbed_per_update=2
  - sampling.prompts_per_step=4
  - sampling.group_size=2
  - task.demonstrations=20
  - task.unlabelled=20
  - task.validation=6
  - task.test=6
starts:
  arithmetic:
variants:
  AIRL:
  taken over:
    init: base
    reward_from: AIRL
    overrides: [algorithm.frozen_discriminator=true]
  GRPO:
    overrides: [algorithm.name=grpo]
comparisons:
  - [AIRL, best SFT]
  - [GRPO, AIRL]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole tiny study, its cells run in this process: study, cells, folder."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(TINY)
    study = load_study(str(folder / "tiny.yaml"))
    cells = plan(study, folder / "out")
    fsync, os.fsync = os.fsync, lambda file: None
    try:
        for cell in cells:
            assert not waiting_for(cell, cells)
            run_cell(study, cell)
    finally:
        os.fsync = fsync
    return study, cells, folder / "out"


def made(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def changed(*pairs):
    text = TINY
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", studies())
def test_the_studies_that_ship_are_runnable_and_described(name):
    study = load_study(name)
    assert len(study.seeds) >= 3
    assert len(study.variants) <= 20
    assert len(description(study_text(name))) > 40
    cells = plan(study, Path("runs"))
    assert len({cell.folder for cell in cells}) == len(cells)
    before: set[Path] = set()
    for cell in cells:
        assert set(cell.needs) <= before, cell.title
        before.add(cell.folder)
        assert costs.estimate(study, cell) > 0
    # What all tables have to have beside AIRL: the reward frozen, and the true outcome.
    of = [" ".join(v.overrides) for v in study.variants.values()]
    assert any("frozen_discriminator=true" in o for o in of)
    assert any("algorithm.name=grpo" in o for o in of)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("seeds: [0]", "seeds: []")], "seeds: .*at least 1"),
        ([("seeds: [0]", "seeds: [1, 1]")], "one is twice"),
        ([("recipe: arithmetic", "recipe: arithmetics")], "did you mean arithmetic"),
        ([("samples: 2", "sample: 2")], "sample: Unexpected keyword"),
        ([("reward_from: AIRL", "reward_from: GRPO")], "expected one of the variants before it"),
        ([("init: base", "init: best")], "taken over.init"),
        ([("    init: base", "    start: elsewhere")], "no start is called 'elsewhere'"),
        ([("- [GRPO, AIRL]", "- [GRPO, PPO]")], "no variant is called 'PPO'"),
        ([("  GRPO:", "  airl:"), ("[GRPO, AIRL]", "[airl, AIRL]")], "two are the same"),
        ([("algorithm.name=grpo", "algorithm.name=ppo")], "variants.GRPO: .*algorithm.name"),
        ([("algorithm.name=grpo", "run.seed=3")], "run.seed is set by the study"),
        ([("algorithm.name=grpo", "policy.model=x")], "policy.model is where the start's SFT"),
        ([("run.steps=3", "run.stepz=3")], "did you mean run.steps"),
        ([("temperatures: [1.0, 0.0]", "temperatures: [0.0]")], "expected 1 among them"),
        (
            [("algorithm.name=grpo", "discriminator.head=score, discriminator.trunk=policy")],
            "set discriminator.trunk=own",
        ),
        ([("comparisons:", "plots: {All: [PPO]}\ncomparisons:")], "no variant is called 'PPO'"),
        ([("seeds: [0]", "seeds: &all [0]")], None),
        ([("seeds: [0]", "seeds: *all")], "not readable as YAML"),
        ([("recipe: arithmetic\n", "- recipe\n")], "not readable|expected `key: value`"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_run(pairs, message, tmp_path):
    source = made(tmp_path, changed(*pairs))
    if message is None:
        load_study(source)
        return
    with pytest.raises(ConfigError, match=message):
        load_study(source)


def test_overrides_of_the_command_come_after_the_file_and_before_starts_and_variants(
    tmp_path, capsys
):
    source = made(
        tmp_path, changed(("  arithmetic:", "  arithmetic:\n    overrides: [task.test=5]"))
    )
    study = load_study(source, None, ["run.steps=4", "task.test=9", "policy.model=a-folder"])
    config = study.config(0, tmp_path, "arithmetic")
    assert (config.run.steps, config.task.test, config.policy.model) == (4, 5, "a-folder")
    for wrong, message in (("run.stepz=4", "did you mean run.steps"), ("run.seed=4", "remove it")):
        assert cli.main(["study", source, wrong, "--output-dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    after = ["study", source, "--output-dir", str(tmp_path / "out"), "run.stepz=4"]
    assert cli.main(after) == 2
    assert "did you mean run.steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*after, "--nothing=3", "stray"])
    assert "unrecognized arguments: --nothing=3 stray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arms_of_sft_are_annealed_whatever_the_study_says(tmp_path):
    study = load_study(made(tmp_path, TINY), None, ["policy.final_lr_fraction=1"])
    left = {
        cell.kind: cell_config(study, cell).policy.final_lr_fraction
        for cell in plan(study, tmp_path / "out")
        if cell.kind != "variant"
    }
    assert left == {"arm": 0.1, "start": 1}


def test_a_name_that_is_none_is_told_what_there_is():
    with pytest.raises(ConfigError, match="countdown-transfer"):
        load_study("nothing")


def test_every_cell_leaves_its_result_and_no_checkpoints(tiny):
    _, cells, folder = tiny
    assert [c.kind for c in cells] == ["arm", "arm", "start", "variant", "variant", "variant"]
    assert all(cell.done for cell in cells)
    assert not list(folder.rglob("checkpoints"))
    airl = cells[3].result()
    assert len(airl["measured"]["sampled"]) == 6
    assert set(airl["rerank"]) == {"random pick", "majority vote", "log pi", "f", "oracle"}
    assert [step for step, _ in airl["curves"]["valid/pass@1"]] == [0, 1, 2, 3]
    assert airl["curves"]["valid/kl"][0][1] == pytest.approx(0.0, abs=1e-5)
    assert set(airl["curves"]) >= {"valid/f", "valid/kl", "disc/accuracy"}
    assert "rerank" not in cells[5].result()  # GRPO has no reward


def test_the_warm_start_is_made_once_and_chosen_on_validation(tiny):
    study, cells, _ = tiny
    scores = cells[0].result()["scores"] | cells[1].result()["scores"]
    assert len(scores) == 4
    chosen = cells[2].result()["chosen"]
    assert scores[chosen["greedy"]][1] == max(greedy for _, greedy in scores.values())
    assert scores[chosen["sampled"]][0] == max(sampled for sampled, _ in scores.values())
    assert {chosen["greedy"], chosen["sampled"]} == set(choose_sft(scores))
    of = {c.name: cell_config(study, c) for c in cells if c.kind == "variant"}
    assert of["AIRL"].policy.model == of["GRPO"].policy.model == chosen["greedy"]
    assert of["taken over"].policy.model == "arithmetic-base"
    assert of["taken over"].discriminator.saved == str(cells[3].folder / "reward")


def test_a_cell_keeps_at_most_its_last_model_in_memory(tiny, tmp_path, monkeypatch):
    """Python need not have looked for cycles by itself in between."""
    study, cells, _ = tiny
    start = next(cell for cell in cells if cell.kind == "start")
    held = []
    load = building.Policy.from_pretrained

    def watched(*args, **kwargs):
        held.append(sum(isinstance(kept, torch.nn.Parameter) for kept in gc.get_objects()))
        return load(*args, **kwargs)

    monkeypatch.setattr(building.Policy, "from_pretrained", watched)
    gc.collect()
    gc.disable()
    try:
        run_cell(study, dataclasses.replace(start, folder=tmp_path / "again"))
    finally:
        gc.enable()
    assert len(held) == len(start.result()["methods"]) > 1
    assert max(held) == held[0]


def test_the_frozen_reward_of_another_run_stays_its_reward(tiny):
    _, cells, _ = tiny
    for file in (cells[3].folder / "reward").glob("*.safetensors"):
        assert file.read_bytes() == (cells[4].folder / "reward" / file.name).read_bytes()


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_a_cell_that_is_stopped_goes_on_and_ends_the_same(tiny, tmp_path, monkeypatch):
    study, cells, _ = tiny
    whole = cells[3]
    moved = Cell(seed=0, kind="variant", name="AIRL", folder=tmp_path / "cell", needs=whole.needs)

    class After:
        def __init__(self, looks):
            self.looks = looks

        def is_set(self):
            self.looks -= 1
            return self.looks < 0

    monkeypatch.setattr(jobs, "_asked", After(2))  # in the middle of the run
    with pytest.raises(jobs.StoppedError):
        run_cell(study, moved)
    assert not moved.done
    stopped_at = len((moved.folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < stopped_at < 4
    monkeypatch.setattr(jobs, "_asked", None)
    result = run_cell(study, moved)
    expected = whole.result()
    assert json.loads(json.dumps(result["measured"])) == expected["measured"]
    assert json.loads(json.dumps(result["curves"])) == expected["curves"]
    assert json.loads(json.dumps(result["rerank"])) == expected["rerank"]


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
            curves = {"valid/pass@1": [[0, 0.1 * cell.seed], [5, 0.5]],
                      "valid/kl": [[0, 0.0], [5, 1.0 + cell.seed]]}  # fmt: skip
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
    assert [point[0] for point in at["GRPO"].curves["valid/pass@1"]] == [0, 5]
    assert at["GRPO"].curves["valid/pass@1"][0][1:] == pytest.approx((0.1, 0.1, 0.1))
    assert at["GRPO"].curves["valid/kl"][0] == (0, 0.0, 0.0, 0.0)


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


def test_costs_grow_with_what_is_run_and_are_corrected(tmp_path):
    small = load_study(made(tmp_path, TINY))
    large = load_study(made(tmp_path, changed(("run.steps=3", "run.steps=30"))))
    one, other = plan(small, tmp_path), plan(large, tmp_path)
    assert costs.estimate(large, other[3]) > 2 * costs.estimate(small, one[3])
    assert costs.estimate(small, one[0]) == costs.estimate(large, other[0])
    listed = costs.table(small, one)
    assert [(name, count) for name, count, _ in listed] == [
        ("arithmetic, SFT arm 1", 1), ("arithmetic, SFT arm 2", 1), ("arithmetic", 1),
        ("AIRL", 1), ("taken over", 1), ("GRPO", 1),
    ]  # fmt: skip
    clock = costs.Clock(small, one, 2)
    whole = clock.left()
    assert whole == pytest.approx(sum(seconds for *_, seconds in listed) / 2)
    expected = clock.estimates[one[0].folder]
    clock.finished(one[0], 3 * expected)  # three times as long as was thought
    assert clock.left() == pytest.approx(3 * (whole - expected / 2))
    assert [costs.in_words(s) for s in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]


def test_a_failing_cell_takes_along_only_those_that_need_it(tmp_path, capsys):
    """In worker processes: it is named, the status is 1, and the next time it is run again."""
    text = changed(
        ("  AIRL:\n", "  AIRL:\n    overrides: [discriminator.model=./nowhere]\n"),
        ("  - run.steps=3", "  - run.steps=1"),
        ("[[2.0e-4, 2], [1.0e-3, 2]]", "[[2.0e-4, 2]]"),
    )
    source, folder = made(tmp_path, text), tmp_path / "out"
    options = ["--output-dir", str(folder)]
    assert cli.main(["study", source, *options]) == 1
    out, err = capsys.readouterr()
    assert "5 cells, 0 of them done" in out
    assert "seed 0: AIRL: ValueError" in err
    assert "seed 0: taken over: not run: it needs seed 0: AIRL" in err
    assert "Traceback" in (folder / "seed-0" / "airl" / "error.txt").read_text()
    assert "| GRPO |" in (folder / "results.md").read_text()
    assert cli.main(["study", source, *options]) == 1
    assert "5 cells, 3 of them done" in capsys.readouterr().out
    assert cli.main(["study", source, *options, "--seeds", "1"]) == 2
    assert "holds a study of other settings, seeds=[0]: give them again" in capsys.readouterr().err


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    text = changed(("[[2.0e-4, 2], [1.0e-3, 2]]", "[[2.0e-4, 100000]]"))
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "airl_fast", "study", made(tmp_path, text)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--output-dir", str(folder)], text=True, **pipes)
    metrics = folder / "seed-0" / "arithmetic" / "sft-1" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "the same command goes on from there" in err
    steps = metrics.read_text().count("\n")
    assert re.search(rf"SFT arm 1: {steps}/\d+ stopped$", out, re.MULTILINE)
    assert (metrics.parent / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_without_a_name_the_studies_are_listed(capsys):
    assert cli.main(["study"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}\n    {description(study_text(name))}" in out for name in studies())
    assert cli.main(["study", "nothing"]) == 2
    assert "no study" in capsys.readouterr().err


def test_a_study_is_frozen():
    with pytest.raises(AttributeError):
        load_study("arithmetic-grid").seeds = (1,)
    assert isinstance(load_study("arithmetic-grid"), Study)
