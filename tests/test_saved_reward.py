"""A reward of one run in another."""

import pytest

from airl_fast.discriminator import Discriminator
from airl_fast.trainer import Trainer
from tests.watched import OWN_TRUNK, Watched, assert_same, bits, changed, make_config

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_reward_trains_another_policy_on_another_task(frozen, tmp_path):
    both = ["policy.model=countdown-base", "sampling.max_new_tokens=30"]
    Trainer(make_config(tmp_path / "first", *both)).train()
    saved = Discriminator.from_pretrained(tmp_path / "first" / "reward")
    config = make_config(
        tmp_path / "second",
        *both,
        "task.name=countdown",
        f"discriminator.saved={tmp_path / 'first'}",
        f"algorithm.frozen_discriminator={frozen}",
    )
    trainer = Watched(config)
    for weights in trainer.weights:
        of_disc = {n: v for n, v in weights.items() if n.startswith("disc.")}
        assert_same(of_disc, bits({f"disc.{n}": p for n, p in saved.named_parameters()}))
    trainer.train()
    moved = changed(of_disc, {n: v for n, v in trainer.weights[-1].items() if n in of_disc})
    assert bool(moved) != frozen
    # After the warm start, which the policy has and the reward has not.
    assert_same(of_disc, {n: v for n, v in trainer.weights[1].items() if n in of_disc})


def test_a_saved_reward_of_another_form_or_tokenizer_is_refused(tmp_path):
    Trainer(make_config(tmp_path / "first", "run.steps=1")).train()
    saved = f"discriminator.saved={tmp_path / 'first' / 'reward'}"
    for overrides, message in (
        (["discriminator.head=score"], "head=lm, and the configuration says score"),
        (["discriminator.span_logp=mean"], "span_logp=sum, and the configuration says mean"),
        (["policy.model=countdown-base"], "another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(make_config(tmp_path / "second", saved, *overrides))
    with pytest.raises(ValueError, match="no such folder"):
        Trainer(make_config(tmp_path / "second", "discriminator.saved=nowhere"))
    Trainer(make_config(tmp_path / "other", *OWN_TRUNK, "run.steps=1")).train()
    with pytest.raises(ValueError, match="reads the hidden states of the policy"):
        Trainer(make_config(tmp_path / "third", f"discriminator.saved={tmp_path / 'other'}"))
