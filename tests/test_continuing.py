"""A run that was stopped goes on, with the same bits; and what may be changed meanwhile."""

import json

import pytest
import torch
from safetensors.torch import load_file

from airl_fast.config import load_config
from airl_fast.policy import Policy
from airl_fast.trainer import Trainer
from tests.watched import (
    LORA,
    OWN_TRUNK,
    SHAPED,
    SHARED,
    WGAN,
    StoppedError,
    assert_same,
    everything,
    make_config,
    stop_at,
    without_seconds,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


RUNS = {
    "full": ["discriminator.updates_per_step=2"],
    "shared": [
        *SHARED,
        "discriminator.replay=5",
        "discriminator.replay_fraction=0.5",
        "algorithm.kl_beta=0.1",
        "algorithm.policy_updates=2",
    ],
    "throttled": ["discriminator.accuracy_throttle=0.5", *SHAPED],
    "policy-trunk": [*OWN_TRUNK, "algorithm.sft_warmup=0", "algorithm.kl_beta=0.1"],
    "wgan": [*WGAN, *LORA, "algorithm.expert_in_group=true"],
    "frozen": ["algorithm.frozen_discriminator=true"],
    "averaged": ["discriminator.ema_decay=0.7", "discriminator.pair_weight=1", "run.eval_kl=true"],
    "bfloat16": ["policy.dtype=bfloat16", "discriminator.ema_decay=0.7"],
    "sft": ["algorithm.name=sft", "run.steps=4"],
    "grpo": ["algorithm.name=grpo", "algorithm.sft_warmup=2"],
}
LONGER = ["algorithm.sft_warmup=2", "discriminator.warmup_updates=2", "run.eval_every=2"]


def interrupted(config, at):
    """Run, stopping after the steps ``at``, each time going on with a trainer made anew."""
    for stop in at:

        def kill(metrics, stop=stop):
            if metrics["step"] == stop:
                raise StoppedError

        trainer = Trainer(config, on_step=kill)
        torch.manual_seed(stop)  # nothing may hang on the global state
        with pytest.raises(StoppedError):
            trainer.train()
    trainer = Trainer(config)
    return trainer, trainer.train()


def checkpoint(folder):
    """Tensors and state of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    state["config"]["run"].pop("output_dir")
    state["config"]["run"].pop("checkpoint_every")
    return load_file(newest / "tensors.safetensors"), state


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_with_the_same_bits(name, every, tmp_path):
    overrides = [*LONGER, *RUNS[name]]
    whole = Trainer(make_config(tmp_path / "whole", *overrides))
    expected = whole.train()
    config = make_config(tmp_path / "cut", *overrides, f"run.checkpoint_every={every}")
    # After every step, in every phase; with a checkpoint every second step, some are run again.
    trainer, metrics = interrupted(config, range(1, whole.total_steps))
    assert without_seconds(metrics) == without_seconds(expected)
    assert_same(everything(whole), everything(trainer))
    tensors, state = checkpoint(tmp_path / "whole")
    again, state_again = checkpoint(tmp_path / "cut")
    assert any(n.startswith(("sft_adamw", "policy_adamw")) for n in tensors)
    assert_same(tensors, again)
    assert state == state_again
    for part in ("policy", "reward"):
        for file in (tmp_path / "whole" / part).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "cut" / part / file.name).read_bytes()
    if name == "throttled":
        assert {line.get("disc/throttled") for line in expected} >= {0.0, 1.0}
    if name == "shared":
        assert len(trainer.disc_learner.replay.traces) == 5


def test_a_kill_within_a_step_is_no_different(tmp_path):
    whole = Trainer(make_config(tmp_path / "whole"))
    expected = whole.train()
    config = make_config(tmp_path / "cut", "run.checkpoint_every=1")
    for learner, part in (
        ("disc_learner", "update"),
        ("policy_learner", "update"),
        ("folder", "save"),
    ):
        trainer = Trainer(config)
        method = getattr(getattr(trainer, learner), part)

        def kill(*arguments, method=method, learner=learner):
            if learner != "folder":
                method(*arguments)
            raise StoppedError

        setattr(getattr(trainer, learner), part, kill)
        with pytest.raises(StoppedError):
            trainer.train()
    trainer = Trainer(config)
    assert without_seconds(trainer.train()) == without_seconds(expected)
    assert_same(everything(whole), everything(trainer))


def test_a_half_written_line_of_metrics_is_made_again(tmp_path):
    expected = Trainer(make_config(tmp_path / "whole")).train()
    config = make_config(tmp_path / "cut", "run.checkpoint_every=1")
    with pytest.raises(StoppedError):
        Trainer(config, on_step=stop_at(2)).train()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "pha')
    assert without_seconds(Trainer(config).train()) == without_seconds(expected)


def test_the_seed_decides_the_run(tmp_path):
    runs = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer(make_config(tmp_path / folder, *SHARED, f"run.seed={seed}"))
        torch.manual_seed(len(runs))
        runs.append((without_seconds(trainer.train()), everything(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = make_config(tmp_path)
    first = Trainer(config).train()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}
    assert Trainer(config).train() == first
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.learning_rate=1e-3", r"policy\.learning_rate \(0\.0002 -> 0\.001\)"),
        ("sampling.group_size=3", r"sampling\.group_size \(2 -> 3\)"),
        ("run.seed=5", r"run\.seed \(0 -> 5\)"),
        ("run.steps=3", r"run\.steps \(2 -> 3\)"),
        ("discriminator.betas=[0.9, 0.99]", r"discriminator\.betas"),
    ],
)
def test_another_configuration_may_not_go_on(override, message, tmp_path):
    config = make_config(tmp_path, "run.checkpoint_every=1")
    with pytest.raises(StoppedError):
        Trainer(config, on_step=stop_at(2)).train()
    with pytest.raises(ValueError, match=rf"another configuration; it differs in {message}"):
        Trainer(make_config(tmp_path, override)).train()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_the_weights_do_not_hang_on_may_change(tmp_path):
    expected = Trainer(make_config(tmp_path / "whole")).train()
    config = make_config(tmp_path / "cut", "run.checkpoint_every=1")
    with pytest.raises(StoppedError):
        Trainer(config, on_step=stop_at(2)).train()
    changes = ["run.checkpoint_every=7", "run.keep_checkpoints=1", "run.resume=must"]
    metrics = Trainer(make_config(tmp_path / "cut", *changes)).train()
    assert without_seconds(metrics) == without_seconds(expected)


def test_a_run_at_a_constant_rate_may_be_made_longer_not_shorter(tmp_path):
    constant = ("policy.final_lr_fraction=1", "discriminator.final_lr_fraction=1")
    whole = Trainer(make_config(tmp_path / "whole", *constant, "run.steps=4"))
    expected = whole.train()
    Trainer(make_config(tmp_path / "cut", *constant, "run.steps=2")).train()
    longer = Trainer(make_config(tmp_path / "cut", *constant, "run.steps=4"))
    assert without_seconds(longer.train()) == without_seconds(expected)
    assert_same(everything(whole), everything(longer))
    assert load_config(tmp_path / "cut" / "config.yaml").run.steps == 4
    with pytest.raises(ValueError, match=r"6 finished steps, and run\.steps=1 asks for 3"):
        Trainer(make_config(tmp_path / "cut", *constant, "run.steps=1")).train()


@pytest.mark.parametrize("falling", ["policy", "discriminator"])
def test_a_run_at_a_falling_rate_keeps_its_length(falling, tmp_path):
    rates = [
        f"{part}.final_lr_fraction={0.1 if part == falling else 1}"
        for part in ("policy", "discriminator")
    ]
    Trainer(make_config(tmp_path, *rates)).train()
    with pytest.raises(ValueError, match=r"it differs in run\.steps \(2 -> 4\)"):
        Trainer(make_config(tmp_path, *rates, "run.steps=4")).train()


def test_saved_bfloat16_weights_are_trained_as_they_are_or_as_told(tmp_path):
    Policy.from_pretrained("arithmetic-base", dtype=torch.bfloat16).save(tmp_path / "saved")
    model = f"policy.model={tmp_path / 'saved'}"
    for name, given, dtype in (
        ("a", [], torch.bfloat16),
        ("b", ["policy.dtype=float32"], torch.float32),
        ("c", LORA, torch.bfloat16),
    ):
        found = Trainer(make_config(tmp_path / name, model, *given))
        assert found.policy.head.weight.dtype == dtype


def test_saved_float16_weights_are_not_trained_as_they_are(tmp_path):
    Policy.from_pretrained("arithmetic-base", dtype=torch.float16).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"weights of float16.*set policy\.dtype=bfloat16 or"):
        Trainer(make_config(tmp_path / "a", f"policy.model={tmp_path / 'saved'}"))


def test_resume_never_and_must(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint and run\.resume=must"):
        Trainer(make_config(tmp_path, "run.resume=must")).train()
    Trainer(make_config(tmp_path, "run.resume=never")).train()
    with pytest.raises(ValueError, match=r"already holds a run and run\.resume=never"):
        Trainer(make_config(tmp_path, "run.resume=never")).train()
    Trainer(make_config(tmp_path, "run.resume=must")).train()


def test_a_warm_start_needs_the_same_adapter_on_both(tmp_path):
    for overrides in (["policy.lora_rank=2"], [*LORA, "discriminator.lora_alpha=3"]):
        with pytest.raises(ValueError, match=r"algorithm\.sft_warmup=1: .*set discriminator\.lora"):
            make_config(tmp_path, *overrides)
        make_config(tmp_path, *overrides, "algorithm.sft_warmup=0")
