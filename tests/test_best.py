"""The best checkpoint: which it is, that it stays, and what is exported from it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from airl_fast.best import METRIC, Best, BestSoFar, read_best
from airl_fast.cli import main
from airl_fast.config import load_config
from airl_fast.discriminator import Discriminator
from airl_fast.export import export_run
from airl_fast.policy import Policy
from airl_fast.trainer import Trainer
from tests.watched import StoppedError, bits, make_config, stop_at, without_seconds

STEPS = 6  # of the policy, after a warm start of 2
# pass@1 by step: the warm start's does not count, and of equal ones the earlier does
FIGURES = {1: 0.9, 2: 0.9, 3: 0.2, 4: 0.5, 5: 0.5, 7: 0.3, 8: 0.4}


@pytest.fixture(autouse=True)
def _figures(monkeypatch):
    def evaluate(self, metrics):
        if self.step in FIGURES and self.data.validation:
            metrics[METRIC] = FIGURES[self.step]

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    monkeypatch.setattr("os.fsync", lambda file: None)


def config(folder, *overrides):
    return make_config(
        folder, f"run.steps={STEPS}", "run.keep_checkpoints=1", "run.checkpoint_every=3", *overrides
    )


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_stays_beside_the_last_and_can_be_exported(tmp_path, capsys):
    kept = {}

    def keep(metrics):
        kept[metrics["step"]] = (
            bits(trainer.policy.trainable()),
            bits(trainer.discriminator.trainable()),
        )
        if metrics["step"] in (5, 6):
            assert names(tmp_path)[0] == "step-000004"

    trainer = Trainer(config(tmp_path), on_step=keep)
    trainer.train()
    assert names(tmp_path) == ["step-000004", "step-000008"]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 4,
        "value": 0.5,
        "metric": "valid/pass@1",
    }
    for arguments, step, folder in (
        ([], 4, "best"),
        (["--checkpoint", "last"], 8, "last"),
        (["--checkpoint", "4", "--output", str(tmp_path / "out")], 4, "out"),
    ):
        assert main(["export", str(tmp_path), *arguments]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / folder)
        policy = bits(Policy.from_pretrained(tmp_path / folder / "policy").trainable())
        reward = bits(Discriminator.from_pretrained(tmp_path / folder / "reward").trainable())
        for expected, found in zip(kept[step], (policy, reward), strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[k], found[k]) for k in expected)
    training = json.loads((tmp_path / "best" / "reward" / "airl_fast.json").read_text())["training"]
    assert training["task"] == "arithmetic"

    assert main(["export", str(tmp_path), "--checkpoint", "5"]) == 2
    assert "holds those of steps [4, 8]" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--checkpoint", "first"]) == 2
    assert "expected best, last or a number" in capsys.readouterr().err
    (tmp_path / "best.json").write_text('{"step": 4')
    assert main(["export", str(tmp_path)]) == 2
    assert "best.json is damaged" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_without_validation_none_is_the_best(tmp_path, capsys):
    Trainer(config(tmp_path, "task.validation=0")).train()
    assert names(tmp_path) == ["step-000008"]
    assert not (tmp_path / "best.json").exists()
    with pytest.raises(ValueError, match=r"was not evaluated.*--checkpoint last"):
        export_run(tmp_path)


def test_in_a_run_of_imitation_every_step_counts(tmp_path):
    Trainer(config(tmp_path, "algorithm.name=sft")).train()
    assert read_best(tmp_path) == Best(1, 0.9)
    assert names(tmp_path) == ["step-000001", "step-000006"]


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_a_run_that_was_stopped_ends_with_the_same_best(at, tmp_path):
    expected = whole_metrics(tmp_path / "whole")
    folder = tmp_path / "cut"
    with pytest.raises(StoppedError):
        Trainer(config(folder), on_step=stop_at(at)).train()
    metrics = Trainer(config(folder)).train()
    assert without_seconds(metrics) == expected
    assert read_best(folder) == Best(4, 0.5)
    assert names(folder) == ["step-000004", "step-000008"]


def whole_metrics(folder):
    return without_seconds(Trainer(config(folder)).train())


def test_killed_before_best_json_it_is_made_from_the_metrics(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("airl_fast.best.write_text", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            Trainer(config(tmp_path)).train()
    assert not (tmp_path / "best.json").exists()
    assert names(tmp_path)[-1] == "step-000003"
    with pytest.raises(StoppedError):
        Trainer(config(tmp_path), on_step=stop_at(4)).train()
    (tmp_path / "best.json").write_bytes(b"\xff torn")
    Trainer(config(tmp_path)).train()
    assert read_best(tmp_path) == Best(4, 0.5)


def test_behind_a_damaged_best_the_run_makes_it_again(tmp_path):
    keep = "run.keep_checkpoints=9"
    with pytest.raises(StoppedError):
        Trainer(config(tmp_path, keep), on_step=stop_at(4)).train()
    file = tmp_path / "checkpoints" / "step-000004" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoppedError):
        Trainer(config(tmp_path, keep), on_step=stop_at(4)).train()
    load_file(file)
    assert read_best(tmp_path) == Best(4, 0.5)


def test_the_best_is_one_that_has_a_checkpoint(tmp_path):
    history = [{"step": s, METRIC: v} for s, v in ((1, 0.9), (2, 0.6), (3, 0.7), (4, 0.6))]
    best = BestSoFar(tmp_path, after=1)
    best.restore(history, [1, 2, 4])
    assert best.best == read_best(tmp_path) == Best(2, 0.6)
    best.restore(history, [])
    assert best.best is None
    assert not (tmp_path / "best.json").exists()
    assert not best.improves({"step": 5})
    assert best.improves({"step": 5, METRIC: 0.1})
    best.saved(6)  # another step was saved: nothing has been recorded of step 5
    assert best.best is None


def test_the_configuration_of_a_run_is_all_that_export_needs(tmp_path):
    Trainer(config(tmp_path / "run")).train()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert load_config(moved / "config.yaml").run.output_dir != str(moved)
    assert (export_run(moved) / "policy" / "model.safetensors").is_file()
    assert not (tmp_path / "run").exists()
