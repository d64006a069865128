"""Which traces the discriminator is taught with, step by step."""

import pytest

from airl_fast import trainer as trainer_module
from airl_fast.packing import Source
from tests.watched import Watched, make_config

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


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


def test_a_warm_up_without_samples_has_corrupted_demonstrations_alone(tmp_path, monkeypatch):
    asked = []
    draw = trainer_module.sample
    monkeypatch.setattr(
        trainer_module, "sample", lambda *a, **k: asked.append(k["seed"]) or draw(*a, **k)
    )
    settings = ("discriminator.warmup_samples=false", "discriminator.replay=6")
    config = make_config(tmp_path, *settings, "discriminator.replay_fraction=1")
    trainer = Watched(config)
    metrics = trainer.train()
    assert [m["phase"] for m in metrics] == ["sft", "discriminator", "policy", "policy"]
    assert len(asked) == 2
    sources = [{t.source for t in traces} for traces, _ in trainer.given["discriminator"]]
    assert sources == [
        {Source.EXPERT, Source.PERTURBED},
        {Source.EXPERT, Source.PERTURBED, Source.POLICY},
        {Source.EXPERT, Source.PERTURBED, Source.POLICY},
    ]
    assert "rollout/length" not in metrics[1]
    assert "disc/loss" in metrics[1]
