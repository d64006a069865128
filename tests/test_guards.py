"""Every guard meets its fault in a real run of a few steps on arithmetic."""

import json
import logging
import math
from dataclasses import asdict, replace

import pytest
import torch

from airl_fast.cli import main
from airl_fast.config import load_config
from airl_fast.guards import GuardError, NonFiniteError, load_fault
from airl_fast.models import Discriminator, Policy
from airl_fast.packing import Source
from airl_fast.passes import span_energies
from airl_fast.rollout import distinct_ngrams, sample
from airl_fast.trainer import Trainer
from airl_fast.watches import Watches

TINY = [
    "run.steps=3",
    "run.threads=1",
    "run.eval_every=0",
    "run.checkpoint_every=100",
    "algorithm.sft_warmup=0",
    "discriminator.warmup_updates=0",
    "discriminator.perturbed_per_update=2",
    "discriminator.replay=8",
    "discriminator.replay_fraction=0.5",
    "sampling.prompts_per_step=2",
    "sampling.group_size=2",
    "sampling.max_new_tokens=16",
    "task.demonstrations=8",
    "task.unlabelled=0",
    "task.validation=4",
    "task.test=0",
]
NAN, INF = float("nan"), float("inf")
WATCHES = (
    "discriminator_saturated",
    "policy_collapse_entropy",
    "policy_collapse_length",
    "policy_collapse_repetition",
    "sampler_mismatch",
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def make_config(folder, *overrides):
    return load_config("arithmetic", [*TINY, f"run.output_dir={folder}", *overrides])


def snapshot(trainer):
    """All that a checkpoint would hold, but for the guards' own counts."""
    kept = {}

    def keep(step, tensors, state):
        kept["tensors"] = {name: tensor.clone() for name, tensor in tensors.items()}
        kept["state"] = json.loads(json.dumps({k: v for k, v in state.items() if k != "guards"}))

    own, trainer.folder.save = trainer.folder.save, keep
    trainer.save_checkpoint()
    trainer.folder.save = own
    return kept["tensors"], kept["state"]


def changed(before, after):
    """The kinds of tensors and values that differ."""
    assert before[0].keys() <= after[0].keys()
    names = {n for n, t in before[0].items() if not torch.equal(t, after[0][n])}
    names |= after[0].keys() - before[0].keys()
    names |= {n for n in before[1] if before[1][n] != after[1][n]}
    return {name.split(".")[0] for name in names}


class Kept(Trainer):
    """A trainer that keeps what a checkpoint would hold, before the first step and after each."""

    def __init__(self, config):
        super().__init__(config, on_step=lambda _: self.states.append(snapshot(self)))
        self.states = [snapshot(self)]


# Values that are not finite


def bad_reward(trainer, at, monkeypatch, value=NAN):
    """The second span of trace 1 has an energy that is not finite."""

    def energies(*arguments):
        values = span_energies(*arguments)
        if trainer.step + 1 in at:
            values[1][0] = value
        return values

    monkeypatch.setattr("airl_fast.trainer.span_energies", energies)


def bad_gradient(trainer, at, model):
    """The gradient of a parameter in the middle holds one infinity; returns its name."""
    parameters = {"policy": trainer.policy, "discriminator": trainer.discriminator}
    name = sorted(parameters[model].trainable())[7]

    def spoil(gradient):
        spoilt = gradient.clone()
        if trainer.step + 1 in at:
            spoilt.view(-1)[3] = INF
        return spoilt

    parameters[model].trainable()[name].register_hook(spoil)
    return name


def bad_loss(trainer, at, model, monkeypatch):
    """A value that goes into a loss is not finite, on its last trace."""
    if model == "policy":
        real = Trainer._advantages

        def advantages(self, *arguments):
            values = real(self, *arguments)
            if trainer.step + 1 in at:
                values[-1][2] = -INF
            return values

        monkeypatch.setattr(Trainer, "_advantages", advantages)
    else:
        real = Discriminator.energies

        def energies(self, batch, hidden):
            f = real(self, batch, hidden)
            wrong = trainer.step + 1 in at and Source.PERTURBED in batch.source
            return torch.cat([f[:-1], f[-1:] * NAN]) if wrong else f

        monkeypatch.setattr(Discriminator, "energies", energies)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_stops_with_its_batch(value, tmp_path, monkeypatch):
    trainer = Kept(make_config(tmp_path))
    bad_reward(trainer, {2}, monkeypatch, value)
    with pytest.raises(NonFiniteError, match=r"step 2 \(policy\).*rewards\[0\] of trace 1") as stop:
        trainer.train()
    assert stop.value.folder == tmp_path / "faults" / "step-000002"
    fault = load_fault(stop.value.folder)
    assert fault.report | {"error": "", "update": ""} == {
        "step": 2,
        "phase": "policy",
        "update": "",
        "error": "",
        "tensor": "rewards",
        "trace": 1,
        "position": 0,
        "value": str(value),
        "parameter": None,
    }
    assert [len(r) for r in fault.rewards] == [len(t.span_lengths) for t in fault.traces[:4]]
    assert fault.rewards[1][0].isnan() if value != value else fault.rewards[1][0] == value
    assert fault.advantages is None
    assert "policy" not in changed(trainer.states[-1], snapshot(trainer))


@pytest.mark.parametrize("model", ["policy", "discriminator"])
def test_a_gradient_that_is_not_finite_stops_and_names_the_parameter(model, tmp_path):
    trainer = Kept(make_config(tmp_path))
    name = bad_gradient(trainer, {2}, model)
    with pytest.raises(NonFiniteError, match=rf"update of the {model}: .*{name}") as stop:
        trainer.train()
    report = load_fault(stop.value.folder).report
    assert (report["tensor"], report["parameter"], report["update"]) == ("gradient", name, model)
    left = changed(trainer.states[-1], snapshot(trainer))
    assert not left & {"policy", "policy_adamw"}
    assert model == "policy" or left == set()


@pytest.mark.parametrize("model", ["policy", "discriminator"])
def test_a_loss_that_is_not_finite_stops_and_names_what_went_in(model, tmp_path, monkeypatch):
    trainer = Kept(make_config(tmp_path))
    bad_loss(trainer, {1}, model, monkeypatch)
    with pytest.raises(NonFiniteError, match=f"update of the {model}") as stop:
        trainer.train()
    fault = load_fault(stop.value.folder)
    if model == "policy":
        assert fault.report["tensor"] == "advantages"
        assert (fault.report["trace"], fault.report["position"]) == (3, 2)
        assert fault.advantages[3][2] == -INF
    else:
        assert fault.report["tensor"] == "f"
        assert fault.traces[fault.report["trace"]].source == Source.PERTURBED
        assert changed(trainer.states[0], snapshot(trainer)) == set()


def test_imitation_is_guarded_too(tmp_path):
    trainer = Trainer(make_config(tmp_path, "algorithm.name=sft"))
    name = bad_gradient(trainer, {2}, "policy")
    with pytest.raises(NonFiniteError, match=r"step 2 \(sft\)") as stop:
        trainer.train()
    fault = load_fault(stop.value.folder)
    assert fault.report["parameter"] == name
    assert {trace.source for trace in fault.traces} == {Source.EXPERT}


def test_a_fault_holds_the_batch_as_it_was(tmp_path):
    trainer = Trainer(make_config(tmp_path))
    bad_gradient(trainer, {1}, "policy")
    given = []
    real = trainer.policy_learner.update
    trainer.policy_learner.update = lambda *a: (given.append(a), real(*a))[1]
    with pytest.raises(NonFiniteError) as stop:
        trainer.train()
    fault = load_fault(stop.value.folder)
    traces, advantages, *_ = given[0]
    assert fault.traces[: len(traces)] == traces
    assert {t.source for t in fault.traces} == set(Source)
    for a, b in zip(fault.advantages, advantages, strict=True):
        assert torch.equal(a, b)
    for trace, logp in zip(fault.traces, fault.logp, strict=True):
        torch.testing.assert_close(logp, trainer._logp([trace])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["gradient", "loss", "reward"])
@pytest.mark.parametrize("model", ["policy", "discriminator"])
def test_a_skipped_update_leaves_no_trace(model, fault, tmp_path, monkeypatch, caplog):
    """Weights, moments, throttle and replay; and no gradient of the micro-batches before."""
    if fault == "reward" and model == "discriminator":
        pytest.skip("the discriminator is updated before there is a reward")
    trainer = Kept(make_config(tmp_path, "guards.non_finite=skip", "run.token_budget=50"))
    if fault == "gradient":
        bad_gradient(trainer, {2}, model)
    elif fault == "loss":
        bad_loss(trainer, {2}, model, monkeypatch)
    else:
        bad_reward(trainer, {2}, monkeypatch)
    clean = []
    inside = trainer.guards._fault

    def look(*arguments):
        inside(*arguments)
        clean.extend(
            p.grad is None for m in (trainer.policy, trainer.discriminator) for p in m.parameters()
        )

    trainer.guards._fault = look
    with caplog.at_level(logging.WARNING):
        lines = trainer.train()
    assert [line["guards/skipped"] for line in lines] == [0, 1, 1]
    assert set(lines[1]) == {"step", "phase", "seconds", "guards/skipped"}
    assert clean
    assert all(clean)
    assert sum("skipped (1 in a row)" in r.message for r in caplog.records) == 1
    of_disc = {"disc", "disc_adamw", "discriminator"}
    of_policy = {"policy", "policy_adamw"}
    skipped = changed(*trainer.states[1:3])
    assert not skipped & of_policy
    assert skipped == (of_disc if model == "policy" else set())
    assert changed(*trainer.states[2:4]) == of_disc | of_policy
    assert load_fault(tmp_path / "faults" / "step-000002").report["step"] == 2


def test_too_many_skips_in_a_row_stop(tmp_path):
    config = make_config(tmp_path, "guards.non_finite=skip", "guards.max_skips=2", "run.steps=9")
    trainer = Trainer(config)
    bad_gradient(trainer, {1, 2, 4, 5, 6}, "policy")
    with pytest.raises(NonFiniteError, match=r"step 6 .*3 steps in a row.*guards.max_skips=2"):
        trainer.train()
    counts = [line["guards/skipped"] for line in trainer.folder.history()]
    assert counts == [1, 2, 2, 3, 4]


def test_a_full_disk_does_not_hide_what_was_wrong(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("airl_fast.faults.save_file", full)
    trainer = Trainer(make_config(tmp_path))
    name = bad_gradient(trainer, {1}, "policy")
    with pytest.raises(NonFiniteError, match=rf"{name}.*could not be written.*No space left"):
        trainer.train()


# Watched states


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


def test_a_checkpoint_from_before_the_guards_goes_on(tmp_path, monkeypatch):
    def without(config):
        return {name: values for name, values in asdict(config).items() if name != "guards"}

    constant = ["policy.final_lr_fraction=1", "discriminator.final_lr_fraction=1"]
    options = [*constant, "guards.non_finite=skip"]
    with monkeypatch.context() as old:
        old.setattr("airl_fast.run_folder.asdict", without)
        trainer = Trainer(make_config(tmp_path, *options, "run.steps=1"))
        save = trainer.folder.save
        trainer.folder.save = lambda step, tensors, state: save(
            step, tensors, {k: v for k, v in state.items() if k != "guards"}
        )
        trainer.train()
    lines = Trainer(make_config(tmp_path, *options, "run.steps=2")).train()
    assert [line["guards/skipped"] for line in lines] == [0, 0]


# On the command line, and numbers by hand


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capfd):
    def energies(*arguments):
        values = span_energies(*arguments)
        values[0][0] = NAN
        return values

    monkeypatch.setattr("airl_fast.trainer.span_energies", energies)
    assert main(["train", "arithmetic", *TINY, f"run.output_dir={tmp_path}"]) == 2
    said = capfd.readouterr().err
    assert "airl-fast: guard non_finite: step 1 (policy)" in said
    assert "Traceback" not in said


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


def test_a_mismatch_of_nan_counts(tmp_path):
    watches = Watches(make_config(tmp_path, "guards.patience=1"), None, torch.float32)
    seen = watches.look(1, "policy", {"sampler_mismatch": math.nan})
    assert seen["guards/sampler_mismatch"] == 1
