"""A reward of one run in another, and in another dtype."""

import json

import pytest
import torch

from airl_fast import RewardScorer, cli
from airl_fast.discriminator import Discriminator
from airl_fast.trainer import Trainer
from tests.tiny_run import tiny_run  # noqa: F401
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


def test_a_saved_reward_takes_the_dtype_of_the_policy_that_it_trains(tmp_path):
    Trainer(make_config(tmp_path / "first", "run.steps=1")).train()
    saved = f"discriminator.saved={tmp_path / 'first'}"
    found = Trainer(make_config(tmp_path / "second", saved, "policy.dtype=bfloat16"))
    assert found.discriminator.body.head.weight.dtype == torch.bfloat16


def test_a_reward_scores_in_another_dtype(tiny_run, tmp_path):  # noqa: F811
    prompts, completions = ["12+9=", "68+4="], ["12+9=21;#21.", "68+4=73;#73."]
    wide = RewardScorer.from_pretrained(tiny_run)
    narrow = RewardScorer.from_pretrained(tiny_run, dtype=torch.bfloat16)
    for body in (narrow.discriminator.body, narrow.policy):
        assert body.head.weight.dtype == torch.bfloat16
    exact, rounded = ([r.f for r in s.score(prompts, completions)] for s in (wide, narrow))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05, abs=0.3)

    rows = tmp_path / "rows.jsonl"
    pairs = zip(prompts, completions, strict=True)
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    for dtype, expected in (([], exact), (["--dtype", "bfloat16"], rounded)):
        out = tmp_path / "scores.jsonl"
        out.unlink(missing_ok=True)
        assert cli.main(["score", str(tiny_run), str(rows), "--output", str(out), *dtype]) == 0
        found = [json.loads(line)["f"] for line in out.read_text().splitlines()]
        assert found == pytest.approx(expected, abs=1e-4)
