"""Layers that are computed again: the same bits, less memory, whoever's adapter is active."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from airl_fast import backend, pack
from airl_fast.loading import add_adapter
from airl_fast.packing import Trace
from airl_fast.policy import Policy
from airl_fast.recompute import recompute_layers
from airl_fast.trainer import Trainer
from tests.distributed_runs import in_processes, train
from tests.watched import SHARED, Watched, assert_same, make_config

PROMPT = tuple(range(3, 9))


def batch(tokens=40):
    ids = torch.randint(3, 14, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    half = tokens // 2
    return pack(
        [
            Trace(prompt=PROMPT, completion=tuple(ids[:half]), span_lengths=(half,)),
            Trace(prompt=PROMPT, completion=tuple(ids[half:]), span_lengths=(tokens - half,)),
        ]
    )


def gradients(model, given):
    model.zero_grad()
    model.hidden(given).square().sum().backward()
    return of_weights(model)


def of_weights(model):
    """The gradients that there are: the head has none."""
    return {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}


def test_gradients_have_the_same_bits_and_most_activations_are_not_kept():
    policy = Policy.from_pretrained("arithmetic-base")
    other, given = copy.deepcopy(policy), batch(400)
    recompute_layers(other)
    recompute_layers(other)  # once is enough
    expected = gradients(policy, given)
    found = gradients(other, given)
    assert_same(found, expected)

    def kept(model):
        sizes = {}

        def note(x):
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(note, lambda x: x):
            model.hidden(given)
        weights = {p.data_ptr() for p in model.model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept(other) < 0.35 * kept(policy)


def test_nothing_is_computed_again_without_gradients(monkeypatch):
    policy = Policy.from_pretrained("arithmetic-base")
    recompute_layers(policy)
    monkeypatch.setattr("airl_fast.recompute.checkpoint", None)
    with torch.no_grad():
        policy.hidden(batch())


def test_two_adapters_over_one_backbone_are_each_computed_with_their_own():
    """The backward pass comes when the other adapter is active."""
    policy = Policy.from_pretrained("arithmetic-base", lora_rank=2)
    other = add_adapter(policy, "discriminator", 2, 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (policy, other):
            for parameter in model.trainable().values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    given = batch()
    expected = [gradients(model, given) for model in (policy, other)]
    assert any(bool(g.any()) for g in expected[1].values())
    recompute_layers(policy)
    for model, wanted in zip((policy, other), expected, strict=True):
        assert_same(gradients(model, given), wanted)
    for first, second in ((policy, other), (other, policy)):
        first.model.zero_grad()
        loss = first.hidden(given).square().sum()
        with second.active():
            loss.backward()
        index = 0 if first is policy else 1
        assert_same(of_weights(first), expected[index])


def test_the_forced_backend_of_the_forward_is_that_of_the_repetition(monkeypatch):
    """A GPU goes backward in a thread that sees no ContextVar."""
    policy = Policy.from_pretrained("arithmetic-base")
    given = batch()
    with backend("reference"):
        expected = gradients(policy, given)
    recompute_layers(policy)
    policy.zero_grad()
    with backend("reference"):
        loss = policy.hidden(given).square().sum()
    loss.backward()
    assert_same(of_weights(policy), expected)


def test_a_model_without_layers_is_refused(monkeypatch):
    policy = Policy.from_pretrained("arithmetic-base")
    monkeypatch.setattr(policy.causal_lm, "_no_split_modules", ["Nothing"])
    with pytest.raises(ValueError, match=r"expected _no_split_modules .*gradient_checkpointing"):
        recompute_layers(policy)


@pytest.mark.parametrize("overrides", [[], SHARED], ids=["full", "shared"])
def test_a_run_ends_with_the_same_bits(overrides, tmp_path):
    ends = []
    for name in ("false", "true"):
        given = [*overrides, f"run.gradient_checkpointing={name}"]
        trainer = Watched(make_config(tmp_path / name, *given))
        trainer.train()
        ends.append(trainer.weights[-1])
    assert_same(*ends)


def test_it_may_be_switched_on_for_the_rest_of_a_run(tmp_path):
    Trainer(make_config(tmp_path)).train()
    Trainer(make_config(tmp_path, "run.gradient_checkpointing=true")).train()


def test_two_processes(tmp_path):
    given = ["policy.model=arithmetic-base", "algorithm.name=sft", "run.steps=2"]
    again = "run.gradient_checkpointing=true"
    many, failed = in_processes(2, train, tmp_path / "two", [*given, again])
    assert not failed
    one = train(tmp_path / "one", given)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_text_that_is_continued_keeps_its_keys():
    policy = Policy.from_pretrained("arithmetic-base")
    ids = torch.arange(3, 14)

    def continued():
        first, kept = policy.continued(ids[:6])
        return torch.cat([first, policy.continued(ids[6:], kept)[0]])

    with torch.no_grad():
        expected = continued()
        recompute_layers(policy)
        assert torch.equal(continued(), expected)
