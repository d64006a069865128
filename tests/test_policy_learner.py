"""One update of the policy against the oracle, however the batch is cut."""

import pytest
import torch
from torch import nn

from airl_fast.learners import PolicyLearner, combine_logp
from airl_fast.optimisation import Optimiser
from airl_fast.packing import pack
from airl_fast.weights import copy_parameters
from tests import oracle
from tests.learning import (
    BUDGETS,
    TRACES,
    Spy,
    alone,
    assert_gradients,
    cu,
    gradients,
    make_config,
    make_policy,
)


def old_and_ref(policy):
    """Log-probs of other policies, so that ratios leave the clip on both sides."""
    generator = torch.Generator().manual_seed(4)
    logp = []
    for trace in TRACES:
        batch = pack([trace])
        with torch.no_grad():
            logp.append(policy.logprob(policy.hidden(batch), batch, 0.8)[0])
    noise = [torch.randn(len(x), generator=generator) for x in logp]
    return [x + 0.4 * n for x, n in zip(logp, noise, strict=True)], [
        x - 0.3 * n for x, n in zip(logp, noise, strict=True)
    ]


OPTIONS = {
    "plain": [],
    "clipped": ["algorithm.policy_updates=2", "algorithm.clip_high=0.3", "algorithm.delta=1.5"],
    "kl": ["algorithm.kl_beta=0.3"],
    "entropy": ["algorithm.entropy_coef=0.1"],
    "all": [
        "algorithm.policy_updates=2",
        "algorithm.kl_beta=0.3",
        "algorithm.entropy_coef=0.1",
    ],
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_policys_update_is_the_oracles(name, budget):
    policy = make_policy()
    config = make_config(
        *OPTIONS[name],
        f"run.token_budget={budget}",
        "sampling.temperature=0.8",
        "sampling.max_new_tokens=8",
    )
    old, ref = old_and_ref(policy)
    old = old if name in ("clipped", "all") else None
    ref = ref if name in ("kl", "all") else None
    generator = torch.Generator().manual_seed(1)
    advantages = [torch.randn(len(t.completion), generator=generator) for t in TRACES]
    spy = Spy(policy.trainable())
    metrics = PolicyLearner(policy, config, spy).update(TRACES, advantages, old, ref)

    policy.model.set_attn_implementation("eager")
    hidden = torch.cat([alone(policy.model, t)[0] for t in TRACES])
    lengths = [len(t.completion) for t in TRACES]
    algorithm = config.algorithm
    loss, stats = oracle.policy_loss(
        hidden,
        policy.model.lm_head.weight,
        torch.cat([torch.tensor(t.completion) for t in TRACES]),
        torch.cat(advantages),
        cu_seqs=cu(lengths),
        old_logp=None if old is None else torch.cat(old),
        ref_logp=None if ref is None else torch.cat(ref),
        temperature=0.8,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        delta=algorithm.delta,
        beta=algorithm.kl_beta,
        entropy_coef=algorithm.entropy_coef,
    )
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert metrics["policy/entropy"] == pytest.approx(stats["entropy"], rel=1e-4)
    assert metrics["policy/clip_fraction"] == pytest.approx(stats["clip_fraction"], abs=1e-6)
    assert metrics["policy/kl_ref"] == pytest.approx(stats["kl"], rel=1e-3, abs=1e-6)
    if name == "clipped":
        assert metrics["policy/clip_fraction"] > 0
    assert_gradients(spy.gradients[0], gradients(loss, policy.trainable()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", BUDGETS)
def test_imitation_is_transformers_cross_entropy(budget, temperature):
    policy = make_policy()
    config = make_config(
        f"run.token_budget={budget}",
        f"sampling.temperature={temperature}",
        "sampling.max_new_tokens=8",
        "algorithm.entropy_coef=0.1",
        "algorithm.kl_beta=0.1",
    )
    spy = Spy(policy.trainable())
    ones = [torch.ones(len(t.completion)) for t in TRACES]
    metrics = PolicyLearner(policy, config, spy, imitation=True).update(TRACES, ones)

    policy.model.set_attn_implementation("eager")
    actions = sum(len(t.completion) for t in TRACES)
    total = torch.zeros(())
    for trace in TRACES:
        ids = torch.tensor([[*trace.prompt, *trace.completion]])
        labels = ids.clone()
        labels[:, : len(trace.prompt)] = -100
        mean = policy.model(ids, labels=labels, use_cache=False).loss
        total = total + mean * len(trace.completion) / actions
    # The loss of a ratio of one is -1 in value; its gradient and log-prob are cross-entropy's.
    assert metrics["policy/logp"] == pytest.approx(-total.item(), rel=1e-4)
    assert_gradients(spy.gradients[0], gradients(total, policy.trainable()))


def test_an_update_moves_the_policy_along_its_advantages():
    policy = make_policy()
    optimiser = Optimiser(
        policy.trainable(), learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.98), clip_norm=1.0
    )
    learner = PolicyLearner(policy, make_config(), optimiser)
    sign = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]
    advantages = [s * torch.ones(len(t.completion)) for s, t in zip(sign, TRACES, strict=True)]

    def gap():
        batch = pack(TRACES)
        with torch.no_grad():
            logp, _ = policy.logprob(policy.hidden(batch), batch)
        return (logp * torch.cat(advantages)).sum().item()

    before = gap()
    for _ in range(3):
        learner.update(TRACES, advantages)
    assert gap() > before + 0.1


# Small parts


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_log_pi_of_spans(how):
    logp = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    expected = oracle.span_logp(logp, offsets, how).float()
    torch.testing.assert_close(combine_logp(logp, offsets, how), expected)


def test_copying_parameters_names_what_is_missing_or_misshapen():
    parameters = {"a": nn.Parameter(torch.zeros(2, 3))}
    copy_parameters(parameters, {"x.a": torch.ones(2, 3)}, "x.")
    assert torch.equal(parameters["a"], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x\.a: expected shape \(2, 3\), found nothing"):
        copy_parameters(parameters, {}, "x.")
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\), found shape \(3,\)"):
        copy_parameters(parameters, {"x.a": torch.ones(3)}, "x.")
