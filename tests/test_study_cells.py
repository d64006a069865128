"""The cells of a study: what each leaves, what goes on after a stop or a failure."""

import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from airl_fast import building, cli, jobs
from airl_fast.measuring import Measured, choose_sft
from airl_fast.study import runner
from airl_fast.study.cells import (
    BASE,
    SAMPLED_SFT,
    SFT,
    Cell,
    cell_config,
    plan,
    run_cell,
    waiting_for,
)
from airl_fast.study.spec import load_study
from tests.tiny_study import TINY, changed, made


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


def test_a_checkpoint_that_is_chosen_twice_is_measured_once(tiny, tmp_path, monkeypatch):
    study, cells, _ = tiny
    start = next(cell for cell in cells if cell.kind == "start")
    for arm, folder in enumerate(start.needs):
        (tmp_path / folder.name).mkdir()
        scores = {f"arm {arm}": (1.0 - arm, 1.0 - arm)}
        (tmp_path / folder.name / "result.json").write_text(json.dumps({"scores": scores}))
    needs = tuple(tmp_path / folder.name for folder in start.needs)
    asked = []

    def measured(model, *_, **__):
        asked.append(model)
        return Measured([float(len(asked))], [0.0], [0.0], 1.0)

    monkeypatch.setattr("airl_fast.study.cells.measure", measured)
    again = dataclasses.replace(start, folder=tmp_path / "again", needs=needs)
    found = run_cell(study, again)["methods"]
    assert asked == ["arithmetic-base", "arm 0"]
    assert [found[name]["sampled"] for name in (BASE, SFT, SAMPLED_SFT)] == [[1.0], [2.0], [2.0]]


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
    result = start.result()
    assert len(held) == len({"arithmetic-base", *result["chosen"].values()}) > 1
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


def reopened(folder, text):
    (folder / "mine.yaml").write_text(text)
    settings = dataclasses.asdict(load_study(str(folder / "mine.yaml")))
    jobs.open_folder(folder / "out", settings, "study", runner._bound)


def test_a_study_may_grow_in_its_folder(tmp_path):
    """What is added needs new cells alone; comparisons and plots need none."""
    reopened(tmp_path, TINY)
    reopened(
        tmp_path,
        changed(
            ("seeds: [0]", "seeds: [0, 1]"),
            ("variants:\n", "  more:\n    overrides: [task.demonstrations=10]\nvariants:\n"),
            ("comparisons:\n  - [AIRL, best SFT]", "  frozen:\ncomparisons:\n  - [frozen, SFT]"),
        ),
    )
    with pytest.raises(ValueError, match=r"of other settings, seeds=\[0, 1\], starts.more"):
        reopened(tmp_path, TINY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("  GRPO:\n    overrides: [algorithm.name=grpo]\n", ""), "variants.GRPO"),
        (("run.steps=3", "run.steps=4"), "overrides="),
        (("init: base", "init: sampled"), 'variants.taken over.init="base"'),
        (("starts:\n", "starts:\n  other:\n"), 'first start="arithmetic"'),
        (("samples: 2\n", "samples: 3\n"), "samples=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_finished_cells_depend_on_cannot_change(tmp_path, change, said):
    reopened(tmp_path, TINY.replace("  - [GRPO, AIRL]\n", ""))
    text = changed(change, ("  - [GRPO, AIRL]\n", ""))
    with pytest.raises(ValueError, match="of other settings") as refusal:
        reopened(tmp_path, text)
    assert said in str(refusal.value)
