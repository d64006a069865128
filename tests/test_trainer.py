"""The loop on arithmetic, a few steps long: who moves, and on what."""

import json
from itertools import pairwise

import pytest
import torch

from airl_fast.attention import standard_attention
from airl_fast.discriminator import Discriminator
from airl_fast.packing import pack
from airl_fast.policy import Policy
from airl_fast.trainer import Trainer
from airl_fast.validation import sample_problems, sample_validation, validate
from airl_fast.weights import swapped
from tests import oracle
from tests.watched import (
    LORA,
    OWN_TRUNK,
    SHAPED,
    SHARED,
    WGAN,
    StoppedError,
    Watched,
    assert_same,
    bits,
    changed,
    make_config,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# Who moves


ALGORITHMS = {
    "f": [],
    "f-logp": ["algorithm.reward=f-logp"],
    "logit-f": ["discriminator.logit=f", "algorithm.reward=f"],
    "wgan": WGAN,
    "shaped": SHAPED,
    "policy-trunk": OWN_TRUNK,
    "shared": SHARED,
    "lora": LORA,
    "sft": ["algorithm.name=sft"],
    "grpo": ["algorithm.name=grpo"],
}


@pytest.mark.parametrize("granularity", ["dense", "interval", "step", "sparse"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_moves_what_it_trains(name, granularity, tmp_path):
    config = make_config(
        tmp_path, *ALGORITHMS[name], f"algorithm.granularity={granularity}", "run.steps=1"
    )
    trainer = Watched(config)
    metrics = trainer.train()
    phases = {"sft": ["sft"], "grpo": ["sft", "policy"]}
    assert [m["phase"] for m in metrics] == phases.get(name, ["sft", "discriminator", "policy"])
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert all(value == value for m in metrics for value in m.values())  # no NaN

    of_policy = {f"policy.{n}" for n in trainer.policy.trainable()}
    of_disc = set()
    if trainer.discriminator is not None:
        theirs = {id(p) for p in trainer.discriminator.trainable().values()}
        of_disc = {
            f"disc.{n}" for n, p in trainer.discriminator.named_parameters() if id(p) in theirs
        }
        if name == "shared":  # the same parameters, seen through the policy
            of_disc |= {
                f"policy.{n}" for n, p in trainer.policy.model.named_parameters() if id(p) in theirs
            }
            of_policy |= {n.replace("policy.", "disc.body.model.", 1) for n in of_policy}
    for line, (before, after) in zip(metrics, pairwise(trainer.weights), strict=True):
        moved = changed(before, after)
        allowed = {
            "sft": of_policy,
            # Before the discriminator's first step it is made a copy of the warm policy.
            "discriminator": of_disc,
            "policy": of_policy | of_disc,
        }[line["phase"]]
        assert moved
        assert moved <= allowed, moved - allowed
        if line["phase"] in ("discriminator", "policy") and of_disc:
            assert moved & of_disc


def test_a_frozen_discriminator_stays_the_warm_policy(tmp_path):
    trainer = Watched(make_config(tmp_path, "algorithm.frozen_discriminator=true"))
    metrics = trainer.train()
    assert [m["phase"] for m in metrics] == ["sft", "policy", "policy"]
    assert trainer.given["discriminator"] == []
    warm = trainer.weights[1]
    for name, parameter in trainer.discriminator.body.model.named_parameters():
        assert torch.equal(parameter, warm[f"policy.{name}"])
    assert trainer.discriminator.kappa.item() == 1.0
    assert trainer.discriminator.offset.item() == 0.0
    assert all(changed(a, b) for a, b in pairwise(trainer.weights))


@pytest.mark.parametrize("overrides", [[], SHARED, LORA], ids=["full", "shared", "lora"])
def test_the_discriminator_starts_at_a_reward_of_zero(overrides, tmp_path):
    """With f = log q and q a copy of the warm policy, f - log pi is zero in the first update."""
    trainer = Watched(make_config(tmp_path, *overrides, "algorithm.granularity=sparse"))
    first = trainer.train()[1]
    assert first["phase"] == "discriminator"
    # At a logit of zero the loss is log 2 whatever the labels.
    assert first["disc/loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)


def test_models_that_are_given_are_trained_in_place_and_not_overwritten(tmp_path):
    policy = Policy.from_pretrained("arithmetic-base")
    discriminator = Discriminator.create(policy)
    with torch.no_grad():
        for p in discriminator.trainable().values():
            p += 0.01
    theirs = bits(discriminator.trainable())
    config = make_config(tmp_path, "algorithm.frozen_discriminator=true")
    trainer = Watched(config, policy=policy, discriminator=discriminator)
    trainer.train()
    assert trainer.policy is policy
    assert_same(theirs, bits(discriminator.trainable()))


# On what


def alone(trainer, trace):
    batch = pack([trace])
    with torch.no_grad():
        hidden = trainer.policy.hidden(batch)
        logp, _ = trainer.policy.logprob(hidden, batch, trainer.config.sampling.temperature)
        f = trainer.discriminator.f(batch, hidden) if trainer.discriminator else None
    return logp, f


def before_the_update(config):
    """A trainer stopped when its policy is about to be updated, and what it was given."""
    trainer, given = Trainer(config), []

    def stop(*arguments):
        given.append(arguments)
        raise StoppedError

    trainer.policy_learner.update = stop
    with pytest.raises(StoppedError):
        trainer.train()
    return trainer, *given[0]


@pytest.mark.parametrize("expert_in_group", [False, True])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("reward", ["f", "f-logp", "outcome"])
def test_advantages_are_the_oracles(reward, baseline, expert_in_group, tmp_path):
    name = ["algorithm.name=grpo"] if reward == "outcome" else [f"algorithm.reward={reward}"]
    config = make_config(
        tmp_path,
        *name,
        f"algorithm.baseline={baseline}",
        f"algorithm.expert_in_group={expert_in_group}",
        "algorithm.granularity=step",
        "algorithm.advantage_level=sequence",
        "algorithm.gamma=0.9",
        "algorithm.reward_clip=5",
        "algorithm.advantage_clip=1.2",
        "sampling.group_size=4",
        "sampling.temperature=0.8",
    )
    trainer, traces, advantages, old_logp, ref_logp = before_the_update(config)
    assert old_logp is None
    assert ref_logp is None
    tokenizer, returns = trainer.policy.tokenizer, []
    answers = {
        tuple(tokenizer(e.prompt).input_ids): e
        for e in (*trainer.task.train, *trainer.task.unlabelled)
    }
    for trace in traces:
        spans = torch.tensor([0, *trace.span_lengths]).cumsum(0)
        logp, f = alone(trainer, trace)
        if reward == "outcome":
            text = tokenizer.decode(trace.completion, skip_special_tokens=True)
            rewards = torch.zeros(len(trace.span_lengths), dtype=torch.float64)
            rewards[-1] = trainer.task.is_correct(text, answers[trace.prompt])
        elif reward == "f":
            rewards = f.double()
        else:
            rewards = f.double() - oracle.span_logp(logp, spans)
        rewards = rewards.clamp(-5, 5)
        one = torch.tensor([0, len(rewards)])
        returns.append(oracle.discounted_returns(rewards, one, 0.9))
    whole = torch.stack([r[0] for r in returns])
    group = torch.tensor([t.group for t in traces])
    for i, trace in enumerate(traces):
        members = whole[group == group[i]]
        others = members.sum() - whole[i]
        base = members.mean() if baseline == "mean" else others / (len(members) - 1)
        per_span = (returns[i] - base) / (members.std(correction=0) + 1e-6)
        expected = per_span.repeat_interleave(torch.tensor(trace.span_lengths)).clamp(-1.2, 1.2)
        if members.std(correction=0) > 1e-3:
            torch.testing.assert_close(advantages[i].double(), expected, atol=5e-3, rtol=1e-3)
    assert len({t.group for t in traces}) == 4


def test_an_outcome_is_compared_whole_whatever_the_spans(tmp_path, monkeypatch):
    """GRPO: (outcome - mean) / std for every token, of short and long completions alike."""

    def right(self, completion, example):  # of any outcome, as long as they differ
        return sum(map(ord, completion)) % 2 == 0

    monkeypatch.setattr("airl_fast.tasks.arithmetic.Arithmetic.is_correct", right)
    config = make_config(
        tmp_path,
        "algorithm.name=grpo",
        "algorithm.granularity=dense",
        "sampling.group_size=6",
        "sampling.temperature=1.5",
        "sampling.max_new_tokens=40",
    )
    trainer, traces, advantages, _, _ = before_the_update(config)
    assert len({len(t.completion) for t in traces}) > 1
    decode = trainer.policy.tokenizer.decode
    outcome = torch.tensor(
        [right(None, decode(t.completion, skip_special_tokens=True), None) for t in traces]
    ).double()
    group = torch.tensor([t.group for t in traces])
    assert any(0 < outcome[group == g].mean() < 1 for g in group.unique())
    for i, mine in enumerate(advantages):
        members = outcome[group == group[i]]
        expected = (outcome[i] - members.mean()) / (members.std(correction=0) + 1e-6)
        torch.testing.assert_close(mine.double(), expected.clamp(-5, 5).expand(len(mine)))


def test_several_updates_share_the_log_probs_of_the_first(tmp_path):
    config = make_config(
        tmp_path, "algorithm.policy_updates=2", "policy.warmup_steps=0", "policy.learning_rate=1e-3"
    )
    trainer = Watched(config)
    metrics = trainer.train()
    calls = trainer.given["policy"]
    assert len(calls) == 4
    assert trainer.policy_learner.optimiser.updates == 4
    for first, second in ((calls[0], calls[1]), (calls[2], calls[3])):
        for a, b in zip(first[2], second[2], strict=True):
            assert torch.equal(a, b)
    # The second update starts where the ratio is no longer one.
    assert metrics[-1]["policy/kl_old"] > 0


def test_log_probs_of_several_updates_are_those_sampled(tmp_path):
    config = make_config(tmp_path, "algorithm.policy_updates=2", "sampling.temperature=0.7")
    trainer, traces, _, old_logp, _ = before_the_update(config)
    for trace, logp in zip(traces, old_logp, strict=True):
        torch.testing.assert_close(alone(trainer, trace)[0], logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overrides", [[], SHARED], ids=["full", "shared"])
def test_the_kl_is_to_the_policy_after_the_warm_start(overrides, tmp_path):
    settings = ["algorithm.kl_beta=0.1", "policy.warmup_steps=0", "policy.learning_rate=1e-3"]
    settings.append("sampling.max_new_tokens=24")
    trainer = Watched(make_config(tmp_path, *overrides, *settings))
    metrics = trainer.train()
    assert [m["phase"] for m in metrics] == ["sft", "discriminator", "policy", "policy"]
    assert metrics[2]["policy/kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[3]["policy/kl_ref"] > 1e-6
    warm = trainer.weights[1]
    assert_same(bits(trainer.reference), {n: warm[f"policy.{n}"] for n in trainer.reference})
    assert set(trainer.reference) == set(trainer.policy.trainable())
    traces, _, _, ref_logp = trainer.given["policy"][1]
    with torch.no_grad():
        for name, parameter in trainer.policy.trainable().items():
            parameter.copy_(warm[f"policy.{name}"])
    for trace, logp in zip(traces, ref_logp, strict=True):
        torch.testing.assert_close(alone(trainer, trace)[0], logp, atol=1e-4, rtol=1e-4)


def test_updates_per_step_and_the_number_of_updates(tmp_path):
    trainer = Watched(make_config(tmp_path, "discriminator.updates_per_step=3"))
    trainer.train()
    assert len(trainer.given["discriminator"]) == 3 * (1 + 2)
    assert trainer.disc_learner.optimiser.updates == 9
    assert trainer.sft_learner.optimiser.updates == 1
    assert trainer.policy_learner.optimiser.updates == 2


def test_evaluation_happens_when_due(tmp_path):
    trainer = Trainer(make_config(tmp_path, "run.eval_every=3", "run.steps=3"))
    metrics = trainer.train()
    # Every third step, the end of the warm start and the last step.
    assert [m["step"] for m in metrics if "valid/pass@1" in m] == [1, 3, 5]
    for line in metrics:
        if "valid/pass@1" in line:
            assert line["valid/pass@1"] * 16 == pytest.approx(round(line["valid/pass@1"] * 16))


def test_evaluations_while_f_warms_up_share_samples_that_are_the_policys(tmp_path, monkeypatch):
    drawn = []

    def drawing(*given):
        drawn.append(trainer.step)
        return sample_validation(*given)

    def comparing(samples, *others):
        anew = sample_validation(trainer.config, trainer.task, trainer.data, trainer.policy)
        used, fresh = ([r.completion for r in each.rollouts] for each in (samples, anew))
        assert used == fresh
        return validate(samples, *others)

    monkeypatch.setattr("airl_fast.trainer.sample_validation", drawing)
    monkeypatch.setattr("airl_fast.trainer.validate", comparing)
    fast = ["policy.warmup_steps=0", "policy.learning_rate=3e-3", "algorithm.sft_warmup=2"]
    given = [*fast, "run.eval_every=1", "discriminator.warmup_updates=3", "run.steps=2"]
    trainer = Trainer(make_config(tmp_path, *given))
    metrics = trainer.train()
    assert all("valid/pass@1" in line for line in metrics)
    assert drawn == [1, 2, 6, 7]  # after each step that moved the policy


def test_evaluations_measure_the_kl_from_the_warm_start(tmp_path):
    fast = ["policy.warmup_steps=0", "policy.learning_rate=3e-3", "run.eval_samples=64"]
    trainer = Trainer(make_config(tmp_path, *fast, "run.eval_every=1", "run.eval_kl=true"))
    metrics = trainer.train()
    assert "valid/kl" not in metrics[0]  # the warm start
    assert metrics[1]["valid/kl"] == pytest.approx(0.0, abs=1e-5)  # the discriminator alone
    assert metrics[3]["valid/kl"] > 0.01
    assert all("policy/kl_ref" not in m or m["policy/kl_ref"] == 0 for m in metrics)
    # Exactly: the sum over tokens of the KL of the two distributions, over the same texts.
    samples = sample_problems(
        trainer.policy,
        trainer.task,
        trainer.data.validation,
        group_size=64,
        max_new_tokens=24,
        seed=0,
    )
    exact = 0.0
    for rollout in samples.rollouts:
        ids = torch.tensor([[*rollout.prompt, *rollout.completion]])
        start = len(rollout.prompt) - 1
        with torch.no_grad(), standard_attention(trainer.policy.causal_lm):
            own = trainer.policy.model(ids).logits[0, start:-1].double().log_softmax(-1)
            with swapped(trainer.policy, trainer.reference):
                other = trainer.policy.model(ids).logits[0, start:-1].double().log_softmax(-1)
        exact += (own.exp() * (own - other)).sum().item() / len(samples.rollouts)
    # Two estimates of one number from the same 256 samples.
    assert metrics[3]["valid/kl"] == pytest.approx(exact, rel=0.5)


def test_rewards_and_the_saved_reward_are_of_the_moving_average(tmp_path):
    config = make_config(
        tmp_path,
        "discriminator.ema_decay=0.9",
        "discriminator.learning_rate=0.01",
        "run.steps=1",
        "algorithm.reward=f",
    )
    trainer, traces, advantages, _, _ = before_the_update(config)
    learner = trainer.disc_learner
    assert any(not torch.equal(learner.average[n], p) for n, p in learner_weights(trainer))
    with swapped(trainer.discriminator, learner.average):
        rewards = torch.cat([alone(trainer, t)[1] for t in traces])
    again = trainer._advantages(traces, rewards.clamp(-30, 30), {})
    for mine, other in zip(advantages, again, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)
    trainer.save(tmp_path / "saved")
    saved = Discriminator.from_pretrained(tmp_path / "saved" / "reward")
    assert_same(bits(saved.trainable()), learner.average)


def learner_weights(trainer):
    return trainer.discriminator.trainable().items()


def test_the_packed_path_agrees_with_the_sampler(tmp_path):
    trainer = Trainer(make_config(tmp_path, "sampling.temperature=0.6", "run.token_budget=64"))
    assert all(m.get("sampler_mismatch", 0) < 1e-3 for m in trainer.train())


def test_the_run_leaves_loadable_models_and_its_metrics(tmp_path):
    trainer = Trainer(make_config(tmp_path, "algorithm.granularity=interval"))
    metrics = trainer.train()
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == metrics
    policy = Policy.from_pretrained(tmp_path / "policy")
    assert_same(bits(policy.trainable()), bits(trainer.policy.trainable()))
    reward = Discriminator.from_pretrained(tmp_path / "reward")
    assert_same(bits(reward.trainable()), bits(trainer.discriminator.trainable()))
    training = json.loads((tmp_path / "reward" / "airl_fast.json").read_text())["training"]
    assert training["granularity"] == "interval"
    assert training["task"] == "arithmetic"
