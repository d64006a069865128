"""Every guard meets its fault in a real run of a few steps on arithmetic."""

import logging
from dataclasses import asdict

import pytest
import torch

from airl_fast.cli import main
from airl_fast.discriminator import Discriminator
from airl_fast.guards import NonFiniteError, load_fault
from airl_fast.packing import Source
from airl_fast.passes import span_energies
from airl_fast.trainer import Trainer
from tests.guarded import INF, NAN, TINY, Kept, bad_gradient, changed, make_config, snapshot

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# Values that are not finite


def bad_reward(trainer, at, monkeypatch, value=NAN):
    """The second span of trace 1 has an energy that is not finite."""

    def energies(*arguments):
        values = span_energies(*arguments)
        if trainer.step + 1 in at:
            values[1][0] = value
        return values

    monkeypatch.setattr("airl_fast.trainer.span_energies", energies)


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


# Older checkpoints, the command line


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
