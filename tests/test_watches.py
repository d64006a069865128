"""Every state that is watched is planted in a real run of a few steps on arithmetic."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from airl_fast.discriminator import Discriminator
from airl_fast.guards import GuardError
from airl_fast.packing import Source
from airl_fast.policy import Policy
from airl_fast.rollout import distinct_ngrams, sample
from airl_fast.trainer import Trainer
from airl_fast.watches import Watches
from tests.guarded import bad_gradient, changed, make_config, snapshot

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

WATCHES = (
    "discriminator_saturated",
    "policy_collapse_entropy",
    "policy_collapse_length",
    "policy_collapse_repetition",
    "sampler_mismatch",
)


@pytest.fixture
def plant(monkeypatch):
    """A function that plants a state in the steps given; the trainer must call it each step."""

    def make(name, steps):
        now = {"step": 1}

        def on_step(metrics):
            now["step"] = metrics["step"] + 1
            if name == "policy_collapse_entropy":  # logits far apart
                turn_sharpness(now["step"])

        def turn_sharpness(step):
            if step in steps and step - 1 not in steps:
                scale(1e3)
            elif step not in steps and step - 1 in steps:
                scale(1e-3)

        @torch.no_grad()
        def scale(factor):
            make.trainer.policy.causal_lm.base_model.norm.weight.mul_(factor)

        def planted(rollout):
            if now["step"] not in steps:
                return rollout
            tokens, logp = rollout.completion, rollout.logp
            if name == "policy_collapse_length":
                return replace(rollout, completion=tokens[:2], logp=logp[:2], finish="end")
            if name == "policy_collapse_repetition":
                return replace(rollout, completion=tokens[:1] * len(tokens))
            if name == "sampler_mismatch":
                return replace(rollout, logp=tuple(value - 0.05 for value in logp))
            return rollout

        def sampled(*arguments, **options):
            return [planted(rollout) for rollout in sample(*arguments, **options)]

        def energies(self, batch, hidden):
            f = real(self, batch, hidden)
            if now["step"] not in steps:
                return f
            expert = (batch.source == Source.EXPERT).repeat_interleave(batch.cu_seq_spans.diff())
            return 0 * f + torch.where(expert, 20.0, -200.0)

        monkeypatch.setattr("airl_fast.trainer.sample", sampled)
        real = Discriminator.energies
        if name == "discriminator_saturated":
            monkeypatch.setattr(Discriminator, "energies", energies)
        return on_step

    return make


# What the tiny run would trip besides, and samples as they come.
LOOSE = [
    "guards.patience=2",
    "guards.truncated_share=1",
    "sampling.max_new_tokens=40",
    "sampling.temperature=0.7",
]


@pytest.mark.parametrize("name", WATCHES)
def test_a_state_is_said_once_on_entering_and_once_on_leaving(name, tmp_path, plant, caplog):
    on_step = plant(name, {2, 3, 4})
    trainer = Trainer(make_config(tmp_path, *LOOSE, "run.steps=5"), on_step=on_step)
    plant.trainer = trainer
    with caplog.at_level(logging.WARNING):
        lines = trainer.train()
    assert [line[f"guards/{name}"] for line in lines] == [0, 0, 1, 1, 0]
    said = [r.getMessage() for r in caplog.records if f"guard {name}" in r.getMessage()]
    assert len(said) == 2
    assert said[0].startswith(f"guard {name}: step 3, 2 in a row: ")
    assert said[1].startswith(f"guard {name}: over at step 5: ")


@pytest.mark.parametrize("name", WATCHES)
def test_a_state_stops_the_run_if_asked_and_can_be_passed(name, tmp_path, plant):
    on_step = plant(name, {2, 3, 4, 5, 6})
    config = make_config(tmp_path, *LOOSE, f"guards.{name}=stop", "run.steps=4")
    trainer = Trainer(config, on_step=on_step)
    plant.trainer = trainer
    with pytest.raises(GuardError, match=rf"guard {name}: step 3.*guards.{name}=warn") as stop:
        trainer.train()
    assert stop.value.guard == name
    assert len(trainer.folder.history()) == 2


def test_a_watch_that_is_off_says_nothing(tmp_path, plant, caplog):
    on_step = plant("sampler_mismatch", {1, 2, 3})
    off = [f"guards.{name}=off" for name in WATCHES]
    lines = Trainer(make_config(tmp_path, *LOOSE, *off), on_step=on_step).train()
    assert not any(key.startswith("guards/") for line in lines for key in line)
    assert not caplog.records


def test_a_loop_that_runs_to_the_limit_is_a_collapse_of_length(tmp_path):
    config = make_config(tmp_path, "sampling.max_new_tokens=3", "guards.patience=1", "run.steps=1")
    assert Trainer(config).train()[0]["guards/policy_collapse_length"] == 1


def test_a_resumed_run_has_the_same_bits_metrics_and_warnings(tmp_path, plant, monkeypatch, caplog):
    """Faults and states before and after the interruption, which falls inside a state."""
    options = [*LOOSE, "guards.non_finite=skip", "run.steps=6", "run.checkpoint_every=1"]

    def run(folder, stops=()):
        said = len(caplog.records)
        for stop in (*stops, None):
            on_step = plant("sampler_mismatch", {2, 3, 4, 5})

            def interrupt(metrics, on_step=on_step, stop=stop):
                on_step(metrics)
                if metrics["step"] == stop:
                    raise KeyboardInterrupt

            trainer = Trainer(make_config(folder, *options), on_step=interrupt)
            on_step({"step": stops[0] if stop is None and stops else 0})
            bad_gradient(trainer, {2, 5}, "policy")
            try:
                lines = trainer.train()
            except KeyboardInterrupt:
                continue
        names = ("step", "phase", "guards/skipped", "guards/sampler_mismatch", "policy/loss")
        texts = [r.getMessage() for r in caplog.records[said:]]
        return (
            snapshot(trainer),
            [{k: line.get(k) for k in names} for line in lines],
            [text.replace(str(folder), "") for text in texts],
        )

    whole = run(tmp_path / "whole")
    halves = run(tmp_path / "halves", stops=(4,))
    assert changed(whole[0], halves[0]) == set()
    assert whole[1:] == halves[1:]
    assert [line["guards/skipped"] for line in whole[1]] == [0, 1, 1, 1, 2, 2]
    assert sum("guard sampler_mismatch" in text for text in whole[2]) == 2


def test_guards_may_change_when_a_run_goes_on(tmp_path, plant):
    options = [*LOOSE, "run.checkpoint_every=1"]
    on_step = plant("sampler_mismatch", {1, 2, 3})
    with pytest.raises(GuardError):
        Trainer(
            make_config(tmp_path, *options, "guards.sampler_mismatch=stop"), on_step=on_step
        ).train()
    on_step({"step": 1})
    lines = Trainer(make_config(tmp_path, *options), on_step=on_step).train()
    assert [line["step"] for line in lines] == [1, 2, 3]


# Numbers by hand


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams([(1, 2, 3)]) is None
    assert distinct_ngrams([(1, 2, 3), (1, 2, 3, 4, 5)]) == 1.0
    assert distinct_ngrams([(7,) * 13]) == pytest.approx(1 / 10)
    assert distinct_ngrams([(1, 2) * 4, (1, 2, 3, 4)]) == pytest.approx((2 / 5 + 1) / 2)


def test_the_tolerance_of_the_sampler_follows_the_dtype(tmp_path):
    def tolerance(*overrides):
        return Trainer(make_config(tmp_path / "run", *overrides)).guards.watches.tolerance

    lora = ["policy.lora_rank=2", "discriminator.lora_rank=2"]
    assert tolerance() == 0.01
    assert tolerance(*lora, "policy.dtype=bfloat16") == 0.5
    assert tolerance("guards.mismatch_tolerance=0.2") == 0.2
    wide = Policy.from_pretrained("arithmetic-base", lora_rank=2, dtype=torch.bfloat16)
    wide.save(tmp_path / "saved")
    assert tolerance(f"policy.model={tmp_path / 'saved'}", *lora) == 0.5


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("highest", 0.01), ("high", 0.1), ("medium", 0.5)]
)
def test_the_precision_of_products(precision, tolerance, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        trainer = Trainer(make_config(tmp_path, f"run.matmul_precision={precision}", "run.steps=2"))
        assert torch.get_float32_matmul_precision() == precision
        assert trainer.guards.watches.tolerance == tolerance
        metrics = trainer.train()
        assert metrics[-1]["sampler_mismatch"] <= tolerance
        Trainer(make_config(tmp_path / "other"))  # null: whatever it is
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_mismatch_of_nan_counts(tmp_path):
    watches = Watches(make_config(tmp_path, "guards.patience=1"), None, torch.float32)
    seen = watches.look(1, "policy", {"sampler_mismatch": math.nan})
    assert seen["guards/sampler_mismatch"] == 1
