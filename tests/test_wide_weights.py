"""Float32 copies of bfloat16 weights: beside torch's AdamW in float32, and what they are for."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from airl_fast.optimisation import Optimiser
from airl_fast.trainer import Trainer
from airl_fast.wide_weights import WideWeights
from tests.distributed_runs import in_processes, train
from tests.watched import StoppedError, make_config

OPTIONS = {"weight_decay": 0.1, "betas": (0.9, 0.98), "clip_norm": 1e9}
SHAPES = ((5, 3), (4,))
SHORT_SFT = ["algorithm.name=sft", "run.steps=3", "run.checkpoint_every=3"]


def weights(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]
    return {f"p{i}": nn.Parameter(values) for i, values in enumerate(drawn)}


def give(named, seed):
    g = torch.Generator().manual_seed(seed)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=g).to(torch.bfloat16).to(p.dtype)


def test_updates_are_those_of_adamw_in_float32():
    named = weights()
    twins = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    optimiser = Optimiser(named, learning_rate=1e-3, **OPTIONS)
    adamw = torch.optim.AdamW(twins.values(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    for seed in range(20):
        give(named, seed)
        give(twins, seed)
        optimiser.step()
        adamw.step()
        for p, wide, twin in zip(
            named.values(), optimiser.wide.updated, twins.values(), strict=True
        ):
            assert torch.equal(wide, twin)
            assert torch.equal(p, twin.to(torch.bfloat16))
            assert p.grad is None


def test_updates_that_a_bfloat16_weight_cannot_show_add_up():
    named = {"p": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    optimiser = Optimiser(named, learning_rate=1e-4, **(OPTIONS | {"weight_decay": 0.0}))
    plain = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    adamw = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        for p in (named["p"], plain):
            p.grad = torch.ones_like(p)
        optimiser.step()
        adamw.step()
    assert plain.item() == 1.0
    assert named["p"].item() == pytest.approx(0.98, abs=0.004)


def test_gradients_of_micro_batches_add_up_in_float32():
    """256 and 256 times 0.5: bfloat16 has no number between 256 and 258."""
    narrow = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    wide = WideWeights([narrow])
    for gradient in (256.0, *[0.5] * 256):
        narrow.grad = torch.full_like(narrow, gradient)
        wide.collect()
        assert narrow.grad is None
    assert wide.updated[0].grad.tolist() == [384.0, 384.0]
    wide.collect()  # nothing new
    assert wide.updated[0].grad.tolist() == [384.0, 384.0]


def test_what_others_set_is_taken_over_and_the_rest_stays_fine():
    narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    wide = WideWeights([narrow])
    with torch.no_grad():
        wide.updated[0].copy_(torch.tensor([1.001, 1.001, 1.001]))
        wide.publish()
        narrow[1] = 5.0
    wide.adopt()
    assert wide.updated[0].tolist() == pytest.approx([1.001, 5.0, 1.001], abs=1e-7)


def test_wide_weights_are_their_own():
    parameter = nn.Parameter(torch.ones(2))
    wide = WideWeights([parameter])
    parameter.grad = torch.ones(2)
    wide.collect()
    wide.adopt()
    wide.publish()
    assert wide.updated[0] is parameter
    assert parameter.grad is not None
    assert wide.state("x") == {}


def test_gradients_of_an_update_that_failed_are_dropped():
    named = weights()
    optimiser = Optimiser(named, learning_rate=1e-3, **OPTIONS)
    give(named, 0)
    optimiser.collect()
    give(named, 1)
    optimiser.clear()
    assert all(p.grad is None for p in (*named.values(), *optimiser.wide.updated))


def test_the_state_is_whole_and_a_missing_copy_is_named():
    named, others = weights(), weights()
    optimiser, other = (Optimiser(n, learning_rate=1e-3, **OPTIONS) for n in (named, others))
    for seed in range(3):
        give(named, seed)
        optimiser.step()
    tensors, state = optimiser.state("adamw")
    tensors = {name: value.clone() for name, value in tensors.items()}
    other.restore(tensors, state, "adamw")
    with torch.no_grad():
        for p, q in zip(others.values(), named.values(), strict=True):
            p.copy_(q)
    for each, it in ((named, optimiser), (others, other)):
        give(each, 7)
        it.step()
    for a, b in zip(optimiser.wide.updated, other.wide.updated, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(
        ValueError, match=r"adamw\.wide\.1: expected shape .* nothing; .*policy\.dtype"
    ):
        other.restore({k: v for k, v in tensors.items() if k != "adamw.wide.1"}, state, "adamw")


def copies_are_the_weights(folder, adamw):
    """In the newest checkpoint every weight is its copy, rounded; how many there are."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    tensors = load_file(newest / "tensors.safetensors")
    narrow = [
        v for k, v in tensors.items() if k.startswith("policy.") and v.dtype == torch.bfloat16
    ]
    wide = {k: v for k, v in tensors.items() if k.startswith(f"{adamw}.wide.")}
    rounded = sorted(v.to(torch.bfloat16).float().sum().item() for v in wide.values())
    assert rounded == sorted(v.float().sum().item() for v in narrow)
    return len(wide)


def test_a_bfloat16_run_learns_as_a_float32_one_does(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(
            tmp_path / dtype,
            f"policy.dtype={dtype}",
            "algorithm.name=sft",
            "run.steps=30",
            "run.checkpoint_every=30",
            "policy.learning_rate=1e-3",
        )
        seen = []
        trainer = Trainer(config, on_step=lambda m, seen=seen: seen.append(m["policy/loss"]))
        trainer.train()
        losses[dtype] = seen
    assert trainer.policy.head.weight.dtype == torch.bfloat16
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05, abs=0.02)
    assert copies_are_the_weights(tmp_path / "bfloat16", "sft_adamw") > 0


def test_two_processes_keep_copies_of_their_pieces(tmp_path):
    given = ["policy.model=arithmetic-base", "policy.dtype=bfloat16", *SHORT_SFT]
    many, failed = in_processes(2, train, tmp_path / "two", given)
    assert not failed
    one = train(tmp_path / "one", given)
    for key in ("policy/loss", "policy/grad_norm"):
        got, expected = ([m[key] for m in run["metrics"]] for run in (many, one))
        assert got == pytest.approx(expected, rel=0.05)
    found = [copies_are_the_weights(tmp_path / name, "sft_adamw") for name in ("one", "two")]
    assert found[0] == found[1] > 0


def test_an_update_begins_without_what_a_failed_one_left(tmp_path):
    ends = []
    for name in ("clean", "planted"):
        given = ["policy.dtype=bfloat16", "run.steps=1", "algorithm.sft_warmup=0"]
        trainer = Trainer(make_config(tmp_path / name, *given))
        for learner in (trainer.policy_learner, trainer.disc_learner):
            if name == "planted":
                for p in (*learner.optimiser.parameters, *learner.optimiser.wide.updated):
                    p.grad = torch.ones_like(p)
        trainer.train()
        models = trainer.policy, trainer.discriminator
        ends.append([p.detach().clone() for m in models for p in m.trainable().values()])
    for clean, planted in zip(*ends, strict=True):
        assert torch.equal(clean, planted)


def test_copies_are_made_for_what_is_updated_alone(tmp_path):
    given = ["policy.dtype=bfloat16", "algorithm.name=sft", "run.steps=1", "run.checkpoint_every=1"]
    trainer = Trainer(make_config(tmp_path, *given))
    trainer.train()
    assert "wide" not in vars(trainer.policy_learner.optimiser)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    names = load_file(newest / "tensors.safetensors").keys()
    assert any(name.startswith("sft_adamw.wide.") for name in names)
    assert not any(name.startswith("policy_adamw.") for name in names)


WARM = ["algorithm.sft_warmup=3", "run.checkpoint_every=2", "run.steps=2"]


def test_a_trainer_that_is_stopped_after_its_warm_start_may_go_back_into_it(tmp_path):
    trainer = Trainer(make_config(tmp_path / "a", *WARM))
    evaluate = trainer._evaluate

    def stop(metrics):
        if trainer.step == 4:
            raise StoppedError
        evaluate(metrics)

    trainer._evaluate = stop
    with pytest.raises(StoppedError):
        trainer.train()
    assert trainer.sft_learner.optimiser.retired
    trainer._evaluate = evaluate
    trainer.train()
    whole = Trainer(make_config(tmp_path / "b", *WARM))
    whole.train()
    weights = [t.policy.trainable().values() for t in (trainer, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_checkpoint_of_before_goes_on_without_the_moments_of_its_warm_start(tmp_path):
    trainer = Trainer(make_config(tmp_path, *WARM))
    trainer.train()
    tensors, state = trainer.folder.open_together(trainer.world)
    other = Optimiser(trainer.policy.trainable(), learning_rate=1e-3, **OPTIONS)
    for p in trainer.policy.trainable().values():
        p.grad = torch.zeros_like(p)
    other.step()
    moments, state["sft"] = other.state("sft_adamw")
    del state["sft"]["retired"]
    trainer.restore(tensors | moments, state)
    assert trainer.sft_learner.optimiser.state("sft_adamw")[0] == {}
