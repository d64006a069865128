"""The audit in real runs: an operator that is a little wrong stops them, a right one never does."""

from dataclasses import replace

import pytest
import torch

from airl_fast.audit import AuditError
from airl_fast.cli import main
from airl_fast.comparison import Comparison
from airl_fast.ops import dispatch
from airl_fast.trainer import Trainer
from tests.guarded import TINY, make_config

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

GROUP = "sampling.group_size=8"  # samples differ: there are advantages
AUDITED = ["run.steps=1", "guards.audit_every=1", GROUP]
LORA = ["policy.lora_rank=2", "discriminator.lora_rank=2"]  # the head is frozen


def plant(monkeypatch, op, output, spoil):
    """Let one output of the backend that serves ``op`` here be wrong."""
    right = dispatch._registry[op]["cpu"]

    def wrong(*arguments):
        results = right.function(*arguments)
        if isinstance(results, torch.Tensor):
            return spoil(results)
        return tuple(spoil(x) if i == output else x for i, x in enumerate(results))

    monkeypatch.setitem(dispatch._registry[op], "cpu", replace(right, function=wrong))


FAULTS = {
    ("linear_logprob", 0): "f|log-prob",
    ("linear_logprob", 1): "entropy",
    ("linear_logprob_backward", 0): "the gradient of f at the hidden state",
    ("linear_policy_loss", 1): "the gradient at the hidden state",
    ("linear_policy_loss", 2): "the gradient of the head",
    ("linear_policy_loss", 5): "log-prob",
    ("linear_policy_loss", 6): "entropy",
    ("discriminator_loss", 0): "the loss",
    ("discriminator_gradient", None): "the gradient at f",
}


@pytest.mark.parametrize(("op", "output"), FAULTS)
def test_one_percent_is_caught_before_anything_is_updated(op, output, tmp_path, monkeypatch):
    plant(monkeypatch, op, output, lambda x: 1.01 * x)
    trainer = Trainer(make_config(tmp_path, *AUDITED))
    before = [p.clone() for p in trainer.policy.parameters()]
    with pytest.raises(AuditError) as stop:
        trainer.train()
    error = stop.value
    assert error.operator == op.replace("discriminator_gradient", "discriminator_loss")
    assert error.backend == "cpu"
    assert error.quantity in FAULTS[op, output].split("|")
    assert error.value == pytest.approx(1.01 * error.reference, rel=1e-4)
    for word in (error.operator, "backend cpu", f"row {error.row}", f"{error.tolerance:.3g}"):
        assert word in str(error)
    assert all(map(torch.equal, before, trainer.policy.parameters()))


def plant_coefficients(monkeypatch, spoil):
    """Let d loss / d logp be wrong in the backend alone: the advantages that it is given are."""
    right = dispatch._registry["linear_policy_loss"]["cpu"]

    def wrong(hidden, head, targets, constants, *arguments):
        return right.function(
            hidden, head, targets, (spoil(constants[0]), *constants[1:]), *arguments
        )

    monkeypatch.setitem(
        dispatch._registry["linear_policy_loss"], "cpu", replace(right, function=wrong)
    )


STEPS = {
    "full": [],
    "full-kl": ["algorithm.kl_beta=0.1", "algorithm.entropy_coef=0.01"],
    "lora": LORA,
    "bfloat16": [*LORA, "policy.dtype=bfloat16"],
}


@pytest.mark.parametrize("rows", [8, 64, 1000])
@pytest.mark.parametrize("name", STEPS)
def test_one_percent_of_the_coefficients_is_caught(name, rows, tmp_path, monkeypatch):
    plant_coefficients(monkeypatch, lambda advantages: 1.01 * advantages)
    config = make_config(tmp_path, *AUDITED, f"guards.audit_rows={rows}", *STEPS[name])
    with pytest.raises(AuditError, match="gradient at the hidden state") as stop:
        Trainer(config).train()
    assert stop.value.value == pytest.approx(1.01 * stop.value.reference, rel=1e-2)


def test_a_single_wrong_row_is_named(tmp_path, monkeypatch):
    spoilt = []

    def spoil(gradient):
        norms = gradient.norm(dim=1)  # a row that is small beside the others
        spoilt.append(int(torch.where(norms > 0.01 * norms.max(), norms, torch.inf).argmin()))
        gradient[spoilt[-1]] *= 1.01
        return gradient

    plant(monkeypatch, "linear_policy_loss", 1, spoil)
    config = make_config(tmp_path, *AUDITED, "guards.audit_rows=10000")
    with pytest.raises(AuditError, match="gradient at the hidden state") as stop:
        Trainer(config).train()
    assert stop.value.row == spoilt[0]


def test_a_frozen_head_and_half_precision_are_audited(tmp_path, monkeypatch):
    wide = [*LORA, "policy.dtype=bfloat16"]
    (line,) = Trainer(make_config(tmp_path / "right", *AUDITED, *wide)).train()
    assert 0 < line["audit/policy"] < 0.8
    assert 0 < line["audit/discriminator"] < 0.8
    plant(monkeypatch, "linear_policy_loss", 1, lambda x: 1.01 * x)
    with pytest.raises(AuditError, match="gradient at the hidden state"):
        Trainer(make_config(tmp_path / "wrong", *AUDITED, *wide)).train()


def test_only_the_steps_that_are_due_are_audited(tmp_path, monkeypatch):
    plant(monkeypatch, "discriminator_loss", 0, lambda x: 1.01 * x)
    trainer = Trainer(make_config(tmp_path, "run.steps=9", "guards.audit_every=3"))
    with pytest.raises(AuditError):
        trainer.train()
    assert [line["step"] for line in trainer.folder.history()] == [1, 2]


@pytest.mark.parametrize("name", ["full", "lora", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_correct_run_never_trips(seed, name, tmp_path):
    options = [
        *STEPS[name],
        "run.steps=3",
        "guards.audit_every=1",
        "algorithm.sft_warmup=2",
        "discriminator.warmup_updates=1",
        "algorithm.policy_updates=2",
        "algorithm.entropy_coef=0.01",
        "algorithm.kl_beta=0.1",
        "algorithm.delta=2",
        f"run.seed={seed}",
    ]
    lines = Trainer(make_config(tmp_path, *options)).train()
    assert len(lines) == 6
    for line in lines:
        assert ("audit/policy" in line) == (line["phase"] != "discriminator")
        assert ("audit/discriminator" in line) == (line["phase"] != "sft")
        for key in ("audit/policy", "audit/discriminator"):
            # Far from where it would trip; half precision rounds the gradients that are compared.
            assert 0 < line.get(key, 0.01) < (0.4 if name == "bfloat16" else 0.1)


VARIANTS = {
    "wgan": [
        "discriminator.logit=wgan",
        "discriminator.label_smoothing=0",
        "algorithm.reward=f",
    ],
    "logit-f": ["discriminator.logit=f", "algorithm.reward=f", "discriminator.span_logp=mean"],
    "score": ["discriminator.head=score", "discriminator.shaping=true"],
    "policy-trunk": ["discriminator.head=score", "discriminator.trunk=policy"],
    "shared": [*LORA, "discriminator.trunk=shared"],
    "frozen": ["algorithm.frozen_discriminator=true", "algorithm.granularity=dense"],
    "grpo": ["algorithm.name=grpo"],
    "experts": ["algorithm.expert_in_group=true", "algorithm.granularity=sparse"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_run_passes_its_audit(name, tmp_path):
    (line,) = Trainer(make_config(tmp_path, *AUDITED, *VARIANTS[name])).train()
    assert line["audit/policy"] < 0.1
    assert ("audit/discriminator" in line) == (name != "grpo")


def test_an_audited_run_has_the_same_bits(tmp_path):
    def weights(folder, every):
        config = make_config(folder, "run.steps=2", f"guards.audit_every={every}")
        trainer = Trainer(config)
        lines = trainer.train()
        seen = [{k: v for k, v in m.items() if k[:5] != "audit" and k != "seconds"} for m in lines]
        return [*trainer.policy.parameters(), *trainer.discriminator.parameters()], seen

    audited, plain = weights(tmp_path / "a", 1), weights(tmp_path / "b", 0)
    assert all(map(torch.equal, audited[0], plain[0]))
    assert audited[1] == plain[1]


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capfd):
    plant(monkeypatch, "discriminator_loss", 0, lambda x: 1.01 * x)
    assert main(["train", "arithmetic", *TINY, *AUDITED, f"run.output_dir={tmp_path}"]) == 2
    said = capfd.readouterr().err
    assert "airl-fast: audit: discriminator_loss, backend cpu: the loss of row 0 is" in said
    assert "Traceback" not in said


def test_values_that_are_not_finite_never_pass():
    one, rows = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AuditError):
            Comparison("op", "cpu").values("x", bad * one, one, rows, atol=1.0)
        with pytest.raises(AuditError):
            Comparison("op", "cpu").gradients(
                "x", bad * one[None], one[None], rows, rtol=1.0, floor=1.0
            )
