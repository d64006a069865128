"""Runs of a few steps on a GPU: nothing is left in the CPU's memory, and they learn the same."""

import json
import math
import os

import pytest
import torch

from airl_fast import RewardScorer
from airl_fast.config import load_config
from airl_fast.trainer import Trainer
from tests.stand_in import ENVIRONMENT
from tests.tiny_run import SMALL

SAME_BITS = ENVIRONMENT in os.environ  # as on a CPU, and from run to run; a GPU drifts off

SHORT = (
    "algorithm.sft_warmup=1",
    "discriminator.warmup_updates=1",
    "run.eval_every=0",
    "sampling.max_new_tokens=16",
)
VARIANTS = {
    "plain": ["run.eval_every=2"],
    "GRPO": ["algorithm.name=grpo"],
    "KL and several updates": [
        *("algorithm.kl_beta=0.1", "algorithm.entropy_coef=0.01", "algorithm.policy_updates=2"),
        *("run.eval_every=2", "run.eval_kl=true", "algorithm.baseline=leave_one_out"),
    ],
    "score head": ["discriminator.head=score", "discriminator.shaping=true"],
    "score head on the policy's states": [
        *("discriminator.head=score", "discriminator.trunk=policy"),
    ],
    "shared backbone": [
        *("policy.lora_rank=4", "discriminator.lora_rank=4", "discriminator.trunk=shared"),
    ],
    "moving average, pairs, replay": [
        *("discriminator.ema_decay=0.9", "discriminator.pair_weight=0.1"),
        *("discriminator.replay=8", "discriminator.replay_fraction=0.5"),
    ],
    "expert in the group": ["algorithm.expert_in_group=true", "algorithm.granularity=dense"],
    "layers computed twice": ["run.gradient_checkpointing=true", "run.token_budget=256"],
}
NOT_COMPARED = {"seconds", "phase", "sampler_mismatch"}  # the last is rounding itself


def run(folder, device, *overrides, **options):
    config = load_config(
        "arithmetic",
        [*SMALL, *SHORT, f"run.device={device}", f"run.output_dir={folder}", *overrides],
    )
    trainer = Trainer(config, **options)
    return trainer, trainer.train()


def everything_is_there(trainer):
    models = trainer.policy, trainer.discriminator
    parameters = [p for model in models if model is not None for p in model.parameters()]
    return all(p.is_cuda for p in parameters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_what_it_is_on_a_cpu(variant, tmp_path, monkeypatch):
    """By the reference backend, in float32: the operators themselves are tested elsewhere."""
    monkeypatch.setenv("AIRL_FAST_BACKEND", "reference")
    # What is sampled after an update of rounded gradients differs: a GPU's first step has them all.
    at_once = [] if SAME_BITS else ["algorithm.sft_warmup=0", "discriminator.warmup_updates=0"]
    trainer, metrics = run(tmp_path / "gpu", "cuda", *VARIANTS[variant], *at_once)
    assert everything_is_there(trainer)
    _, expected = run(tmp_path / "cpu", "cpu", *VARIANTS[variant], *at_once)
    compared = len(expected) if SAME_BITS else 1
    assert len(metrics) == len(expected)
    for line, right in zip(metrics[:compared], expected[:compared], strict=True):
        assert line.keys() == right.keys()
        for name in line.keys() - NOT_COMPARED:
            assert line[name] == pytest.approx(right[name], rel=0.01, abs=2e-3, nan_ok=True), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_by_the_kernels_of_a_gpu(dtype, tmp_path):
    """Whichever serve there, held to the reference; in bfloat16 with flash attention."""
    audited = "run.steps=1", "guards.audit_every=1", "guards.audit_rows=8"
    trainer, metrics = run(tmp_path / "run", "cuda", f"policy.dtype={dtype}", *audited)
    assert everything_is_there(trainer)
    assert trainer.policy.head.weight.dtype == getattr(torch, dtype)
    for line in metrics:
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert any(name.startswith("audit/") for name in line)
        assert line.get("sampler_mismatch", 0) < (1e-3 if dtype == "float32" else 0.5)
    near, far = (
        RewardScorer.from_pretrained(tmp_path / "run", device=device, dtype=torch.float32)
        for device in ("cpu", "cuda")
    )
    prompts, completions = ["68+4+2="] * 2, ["68+4=72;72+2=74;#74.", "68+4=62;62+2=64;#64."]
    for a, b in zip(near.score(prompts, completions), far.score(prompts, completions), strict=True):
        assert a.f == pytest.approx(b.f, abs=2e-3)
        assert a.reward == pytest.approx(b.reward, abs=2e-3)


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_BACKEND", "reference")
    whole, _ = run(tmp_path / "whole", "cuda")
    often = "run.checkpoint_every=1"
    stopped, _ = run(tmp_path / "run", "cuda", often, should_stop=lambda: True)
    assert stopped.step == 1
    goes_on, _ = run(tmp_path / "run", "cuda", often)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, whole.total_steps + 1))
    if SAME_BITS:
        for name, weight in whole.policy.trainable().items():
            assert torch.equal(goes_on.policy.trainable()[name], weight), name
