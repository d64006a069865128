"""The loop on arithmetic, a few steps long: who moves, on what, and exact continuation."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from airl_fast.attention import standard_attention
from airl_fast.config import load_config
from airl_fast.learners import swapped
from airl_fast.models import Discriminator, Policy
from airl_fast.packing import Source, pack
from airl_fast.trainer import Trainer
from airl_fast.validation import sample_problems
from tests import oracle

TINY = [
    "run.steps=2",
    "run.threads=1",
    "run.eval_every=0",
    "run.checkpoint_every=100",
    "algorithm.sft_warmup=1",
    "algorithm.sft_batch=3",
    "discriminator.warmup_updates=1",
    "discriminator.perturbed_per_update=2",
    "sampling.prompts_per_step=4",
    "sampling.group_size=2",
    "sampling.max_new_tokens=24",
    "task.demonstrations=8",
    "task.unlabelled=6",
    "task.validation=4",
    "task.test=0",
]
LORA = ["policy.lora_rank=2", "discriminator.lora_rank=2"]
SHARED = [*LORA, "discriminator.trunk=shared"]
SHAPED = ["discriminator.head=score", "discriminator.shaping=true"]
OWN_TRUNK = ["discriminator.head=score", "discriminator.trunk=policy"]
WGAN = ["discriminator.logit=wgan", "discriminator.label_smoothing=0", "algorithm.reward=f"]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def make_config(folder, *overrides):
    return load_config("arithmetic", [*TINY, f"run.output_dir={folder}", *overrides])


def bits(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def everything(trainer):
    """Every parameter of both models, trained or not."""
    found = {f"policy.{n}": p for n, p in trainer.policy.model.named_parameters()}
    if trainer.discriminator is not None:
        found |= {f"disc.{n}": p for n, p in trainer.discriminator.named_parameters()}
    return bits(found)


def changed(before, after):
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same(before, after):
    assert changed(before, after) == set()


class Watched(Trainer):
    """A trainer that keeps its weights after every step and what its learners were given."""

    def __init__(self, config, **options):
        super().__init__(config, on_step=self._watch, **options)
        self.weights = [everything(self)]
        self.given = {"sft": [], "policy": [], "discriminator": []}
        for name, learner in (
            ("sft", self.sft_learner),
            ("policy", self.policy_learner),
            ("discriminator", self.disc_learner),
        ):
            if learner is not None:
                learner.update = self._keeping(name, learner.update)

    def _watch(self, metrics):
        self.weights.append(everything(self))

    def _keeping(self, name, update):
        def keep(*arguments):
            self.given[name].append(arguments)
            return update(*arguments)

        return keep


# Who moves


ALGORITHMS = {
    "f": [],
    "f-logp": ["algorithm.reward=f-logp"],
    "logit-f": ["discriminator.logit=f"],
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


def prompts_of(traces, source=None):
    return {t.prompt for t in traces if source is None or t.source == source}


@pytest.mark.parametrize("expert_in_group", [False, True])
def test_the_discriminator_sees_pairs_and_the_policy_every_prompt(expert_in_group, tmp_path):
    config = make_config(tmp_path, f"algorithm.expert_in_group={expert_in_group}", "run.steps=3")
    trainer = Watched(config)
    trainer.train()
    tokenizer = trainer.policy.tokenizer

    def prompt_of(example):
        return tuple(tokenizer(example.prompt).input_ids)

    demonstrated = {prompt_of(e): e for e in trainer.task.train}
    unlabelled = {prompt_of(e) for e in trainer.task.unlabelled}
    assert len(trainer.given["discriminator"]) == 1 + 3
    for traces, logp in trainer.given["discriminator"]:
        assert [len(values) for values in logp] == [len(t.completion) for t in traces]
        by = {source: [t for t in traces if t.source == source] for source in Source}
        assert [len(by[s]) for s in (Source.EXPERT, Source.POLICY, Source.PERTURBED)] == [2, 4, 2]
        assert len(prompts_of(by[Source.EXPERT])) == 2
        assert prompts_of(by[Source.EXPERT]) == prompts_of(by[Source.POLICY])
        assert prompts_of(by[Source.PERTURBED]) <= prompts_of(by[Source.EXPERT])
        assert prompts_of(traces) <= set(demonstrated)
        for trace in by[Source.EXPERT]:
            text = tokenizer.decode(trace.completion, skip_special_tokens=True)
            assert text == demonstrated[trace.prompt].completion
        for trace in by[Source.PERTURBED]:
            text = tokenizer.decode(trace.completion, skip_special_tokens=True)
            assert text != demonstrated[trace.prompt].completion
        for group in (0, 1):
            assert len({t.prompt for t in traces if t.group == group}) == 1
    assert len(trainer.given["policy"]) == 3
    for traces, advantages, _, _ in trainer.given["policy"]:
        sampled = [t for t in traces if t.source == Source.POLICY]
        experts = [t for t in traces if t.source == Source.EXPERT]
        assert len(sampled) == 8
        assert len(prompts_of(sampled) & set(demonstrated)) == 2
        assert len(prompts_of(sampled) & unlabelled) == 2
        assert [len(a) for a in advantages] == [len(t.completion) for t in traces]
        assert len(experts) == (2 if expert_in_group else 0)
        for expert in experts:
            mine = {t.prompt for t in sampled if t.group == expert.group}
            assert mine == {expert.prompt}


def alone(trainer, trace):
    batch = pack([trace])
    with torch.no_grad():
        hidden = trainer.policy.hidden(batch)
        logp, _ = trainer.policy.logprob(hidden, batch, trainer.config.sampling.temperature)
        f = trainer.discriminator.f(batch, hidden) if trainer.discriminator else None
    return logp, f


class StoppedError(Exception):
    """Stands for a kill."""


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


def test_replayed_traces_are_older_ones(tmp_path):
    config = make_config(
        tmp_path,
        "discriminator.replay=6",
        "discriminator.replay_fraction=0.5",
        "discriminator.perturbed_per_update=0",
        "run.steps=3",
    )
    trainer = Watched(config)
    trainer.train()
    seen = []
    for i, (traces, _) in enumerate(trainer.given["discriminator"]):
        sampled = [t for t in traces if t.source == Source.POLICY]
        fresh, replayed = sampled[:4], sampled[4:]
        assert len(replayed) == (2 if i else 0)
        kept = seen[-6:]
        assert all(t in kept for t in replayed)
        seen += fresh
    assert trainer.disc_learner.replay.traces == seen[-6:]


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


# Going on


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


def without_seconds(metrics):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


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


def stop_at(step):
    def stop(metrics):
        if metrics["step"] == step:
            raise StoppedError

    return stop


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


def test_saved_bfloat16_weights_are_trained_in_float32_or_under_an_adapter(tmp_path):
    Policy.from_pretrained("arithmetic-base", dtype=torch.bfloat16).save(tmp_path / "saved")
    model = f"policy.model={tmp_path / 'saved'}"
    with pytest.raises(ValueError, match=r"holds weights of bfloat16.*set policy\.dtype=float32"):
        Trainer(make_config(tmp_path / "a", model))
    wide = Trainer(make_config(tmp_path / "b", model, "policy.dtype=float32"))
    assert wide.policy.head.weight.dtype == torch.float32
    adapted = Trainer(make_config(tmp_path / "c", model, *LORA))
    assert adapted.policy.head.weight.dtype == torch.bfloat16


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
