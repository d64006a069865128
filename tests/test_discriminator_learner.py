"""One update of the discriminator against the oracle, however the batch is cut."""

import copy
from dataclasses import replace

import pytest
import torch

from airl_fast.learners import DiscriminatorLearner
from airl_fast.packing import Source
from airl_fast.passes import action_logp
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
    make_discriminator,
    make_policy,
)


def expected_energies(discriminator, policy, temperature=1.0):
    """f and log pi of every trace's spans from the oracle, with plain transformers."""
    plain = copy.deepcopy(policy.model)
    plain.set_attn_implementation("eager")
    body = discriminator.body
    energies, logps = [], []
    for trace in TRACES:
        targets, spans = torch.tensor(trace.completion), cu(trace.span_lengths)
        with torch.no_grad():
            states, actions = alone(plain, trace)
            logp, _ = oracle.linear_logprob(
                states, plain.lm_head.weight, targets, temperature=temperature
            )
        logps.append(oracle.span_logp(logp, spans, discriminator.span_logp))
        if body is not None:
            states, actions = alone(body.model, trace)
        if discriminator.head_kind == "lm":
            logq, _ = oracle.linear_logprob(states, body.model.lm_head.weight, targets)
            f = discriminator.kappa * logq + discriminator.offset
            f = oracle.span_logp(f, spans, discriminator.span_logp)
        else:
            rows = actions @ discriminator.weight.T + discriminator.bias
            last = oracle.segment_last(rows[:, 0], spans)
            f = last
            if discriminator.shaping_gamma is not None:
                h = oracle.segment_last(rows[:, 1], spans)
                zero = h.new_zeros(1)
                after, before = torch.cat([h[:-1], zero]), torch.cat([zero, h[:-1]])
                f = last + discriminator.shaping_gamma * after - before
        energies.append(f)
    return energies, logps


def expected_disc_loss(
    discriminator, policy, logit, *, smoothing=0.0, floor=None, temperature=1.0, left_out=()
):
    """Loss and statistics from the oracle, one trace at a time; spans left out of both."""
    energies, logps = expected_energies(discriminator, policy, temperature)
    labels = [torch.full((len(t.span_lengths),), t.source == Source.EXPERT) for t in TRACES]
    f, logp, is_expert = torch.cat(energies), torch.cat(logps), torch.cat(labels)
    kept = [i for i in range(len(f)) if i not in left_out]
    f, logp, is_expert = f[kept], logp[kept], is_expert[kept]
    if floor is not None:
        logp = logp.clamp(min=floor)
    # Each class weighs half; a critic's means weigh one each, by definition.
    share = torch.where(is_expert, 0.5 / is_expert.sum(), 0.5 / (~is_expert).sum())
    loss, _ = oracle.discriminator_loss(
        f, logp, is_expert, form=logit, label_smoothing=smoothing, weight=share
    )
    votes = (f if logit != "airl" else f - logp) > 0
    right = [(votes == is_expert)[is_expert == label].double().mean() for label in (True, False)]
    stats = {
        "disc/accuracy": (0.5 * (right[0] + right[1])).item(),
        "disc/accuracy_expert": right[0].item(),
        "disc/accuracy_policy": right[1].item(),
        "disc/f_expert": f[is_expert].mean().item(),
        "disc/f_policy": f[~is_expert].mean().item(),
        "disc/logp_floored": float((torch.cat(logps) < floor).sum()) if floor is not None else 0.0,
    }
    return loss, stats


HEADS = ["lm", "lm-mean", "shaped", "policy-trunk"]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("logit", ["f-logp", "f", "wgan"])
@pytest.mark.parametrize("head", HEADS)
def test_the_discriminators_update_is_the_oracles(head, logit, budget):
    policy = make_policy()
    discriminator = make_discriminator(head, policy)
    floor = -9.0 if discriminator.span_logp == "sum" else -3.8
    smoothing = 0.0 if logit == "wgan" else 0.2
    config = make_config(
        f"discriminator.logit={logit}",
        f"discriminator.label_smoothing={smoothing}",
        f"discriminator.logp_floor={floor}",
        f"discriminator.span_logp={discriminator.span_logp}",
        f"run.token_budget={budget}",
        "sampling.max_new_tokens=8",
        "sampling.temperature=0.8",
    )
    learner = DiscriminatorLearner(discriminator, policy, config)
    learner.optimiser = Spy(discriminator.trainable())
    metrics = learner.update(TRACES, logp_of(learner, TRACES, 0.8))

    if discriminator.body is not None:
        discriminator.body.model.set_attn_implementation("eager")
    form = {"f-logp": "airl", "f": "logit", "wgan": "wgan"}[logit]
    loss, stats = expected_disc_loss(
        discriminator, policy, form, smoothing=smoothing, floor=floor, temperature=0.8
    )
    assert metrics["disc/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    for name, value in stats.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert stats["disc/logp_floored"] > 0
    assert_gradients(learner.optimiser.gradients[0], gradients(loss, discriminator.trainable()))
    assert all(p.grad is None for p in policy.trainable().values())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("head", HEADS)
def test_of_perturbed_traces_the_changed_span_alone_can_be_taught(head, budget):
    policy = make_policy()
    discriminator = make_discriminator(head, policy)
    config = make_config(
        "discriminator.perturbed_spans=changed",
        f"discriminator.span_logp={discriminator.span_logp}",
        "discriminator.logp_floor=null",
        f"run.token_budget={budget}",
        "sampling.max_new_tokens=8",
    )
    # The last trace is the perturbed one, and differs from its expert from the first action on.
    assert [t.source for t in TRACES].index(Source.PERTURBED) == len(TRACES) - 1
    assert TRACES[-1].completion[0] != TRACES[1].completion[0]
    learner = DiscriminatorLearner(discriminator, policy, config)
    learner.optimiser = Spy(discriminator.trainable())
    metrics = learner.update(TRACES, logp_of(learner, TRACES))
    if discriminator.body is not None:
        discriminator.body.model.set_attn_implementation("eager")
    spans = sum(len(trace.span_lengths) for trace in TRACES)
    loss, stats = expected_disc_loss(discriminator, policy, "airl", left_out=[spans - 1])
    assert metrics["disc/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert metrics["disc/f_policy"] == pytest.approx(stats["disc/f_policy"], rel=1e-4, abs=1e-4)
    assert_gradients(learner.optimiser.gradients[0], gradients(loss, discriminator.trainable()))


def test_no_floor_leaves_log_pi_alone():
    policy = make_policy()
    discriminator = make_discriminator("lm", policy)
    learner = DiscriminatorLearner(
        discriminator, policy, make_config("discriminator.logp_floor=null")
    )
    learner.optimiser = Spy(discriminator.trainable())
    metrics = learner.update(TRACES, logp_of(learner, TRACES))
    discriminator.body.model.set_attn_implementation("eager")
    loss, _ = expected_disc_loss(discriminator, policy, "airl")
    assert metrics["disc/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["disc/logp_floored"] == 0


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("logit", ["f-logp", "f", "wgan"])
@pytest.mark.parametrize("head", ["lm", "lm-mean", "shaped"])
def test_ranking_and_penalty_add_their_gradients_however_the_batch_is_cut(head, logit, budget):
    policy = make_policy()
    discriminator = make_discriminator(head, policy)
    smoothing = 0.0 if logit == "wgan" else 0.2
    config = make_config(
        f"discriminator.logit={logit}",
        f"discriminator.label_smoothing={smoothing}",
        f"discriminator.span_logp={discriminator.span_logp}",
        "discriminator.logp_floor=-9",
        "discriminator.pair_weight=0.7",
        "discriminator.logit_penalty=0.3",
        f"run.token_budget={budget}",
        "sampling.max_new_tokens=8",
    )
    learner = DiscriminatorLearner(discriminator, policy, config)
    learner.optimiser = Spy(discriminator.trainable())
    metrics = learner.update(TRACES, logp_of(learner, TRACES))

    discriminator.body.model.set_attn_implementation("eager")
    form = {"f-logp": "airl", "f": "logit", "wgan": "wgan"}[logit]
    loss, _ = expected_disc_loss(discriminator, policy, form, smoothing=smoothing, floor=-9.0)
    energies, logps = expected_energies(discriminator, policy)
    logits = [
        f - logp.clamp(min=-9.0) if logit == "f-logp" else f
        for f, logp in zip(energies, logps, strict=True)
    ]
    of = {True: [], False: []}
    for trace, z in zip(TRACES, logits, strict=True):
        of[trace.source == Source.EXPERT].append(z)
    loss = loss + 0.3 * sum(0.5 * torch.cat(z).square().mean() for z in of.values())
    assert metrics["disc/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    pairs = [  # (0, others of prompt 0), (1, others of prompt 1)
        -torch.log(torch.sigmoid(logits[e].sum() - logits[o].sum()))
        for e, others in ((0, (2, 3)), (1, (4, 5, 6)))
        for o in others
    ]
    ranking = torch.stack(pairs).mean()
    assert metrics["disc/pair_loss"] == pytest.approx(ranking.item(), rel=1e-3)
    ahead = [p.item() < torch.log(torch.tensor(2.0)).item() for p in pairs]
    assert metrics["disc/pair_accuracy"] == pytest.approx(sum(ahead) / 5)
    expected = gradients(loss + 0.7 * ranking, discriminator.trainable())
    assert_gradients(learner.optimiser.gradients[0], expected)


def test_pairs_are_of_one_prompt_whatever_the_groups():
    """A replayed trace has the group number of another step."""
    policy = make_policy()
    learner = DiscriminatorLearner(
        make_discriminator("lm", policy), policy, make_config("discriminator.pair_weight=1")
    )
    renumbered = [
        replace(t, group=9) if t.source == Source.POLICY and t.group == 0 else t for t in TRACES
    ]
    one, other = (learner._ranking(t, logp_of(learner, t)) for t in (TRACES, renumbered))
    assert one[1] == other[1]
    assert torch.equal(one[0], other[0])
    alone = [t for t in TRACES if t.source != Source.EXPERT]
    assert learner._ranking(alone, logp_of(learner, alone)) == (None, {})


def test_the_moving_average_is_what_scores():
    policy = make_policy()
    learner = DiscriminatorLearner(
        make_discriminator("lm", policy), policy, make_config("discriminator.ema_decay=0.8")
    )
    expected = state_of(learner.discriminator)
    for _ in range(3):
        learner.update(TRACES, logp_of(learner, TRACES))
        own = state_of(learner.discriminator)
        expected = {n: 0.8 * expected[n] + 0.2 * own[n] for n in own}
    with learner.scoring():
        scoring = state_of(learner.discriminator)
    for name, value in expected.items():
        torch.testing.assert_close(scoring[name], value, msg=name)
    assert any(not torch.allclose(scoring[n], own[n]) for n in own)
    assert all(torch.equal(p, own[n]) for n, p in learner.discriminator.trainable().items())
    learner.restart_average()
    assert all(torch.equal(learner.average[n], own[n]) for n in own)


def test_without_a_moving_average_the_weights_score():
    policy = make_policy()
    learner = DiscriminatorLearner(make_discriminator("lm", policy), policy, make_config())
    learner.update(TRACES, logp_of(learner, TRACES))
    before = state_of(learner.discriminator)
    with learner.scoring():
        assert all(torch.equal(p, before[n]) for n, p in learner.discriminator.trainable().items())


def test_the_discriminators_rate_ends_at_its_share_after_the_runs_updates():
    """Two steps of its own and one of the policy's, of two updates each; then nothing moves."""
    policy = make_policy()
    planned = ["discriminator.warmup_updates=2", "run.steps=1", "discriminator.updates_per_step=2"]
    made = {
        share: DiscriminatorLearner(
            make_discriminator("lm", policy),
            policy,
            make_config(*planned, f"discriminator.final_lr_fraction={share}"),
        )
        for share in (0, 1)
    }
    moved = {share: [] for share in made}
    for share, learner in made.items():
        for _ in range(7):
            before = state_of(learner.discriminator)
            learner.update(TRACES, logp_of(learner, TRACES))
            now = state_of(learner.discriminator)
            moved[share].append(max(float((now[n] - before[n]).abs().max()) for n in now))
    assert moved[0][0] == moved[1][0] > 0  # the first update has the highest rate
    assert all(a < b for a, b in zip(moved[0][1:], moved[1][1:], strict=True))
    assert moved[0][5] > 0
    assert moved[0][6] == 0


@pytest.mark.parametrize(
    ("head", "given", "rate"), [("lm", [], 1e-2), ("score", [], 1e-3), ("score", ["3e-4"], 3e-4)]
)
def test_the_heads_own_rate_is_the_largest_step_of_its_first_update(head, given, rate):
    """AdamW's first step is the rate wherever there is a gradient to speak of."""
    policy = make_policy()
    options = [f"discriminator.head={head}"]
    options += [f"discriminator.head_learning_rate={one}" for one in given]
    made = make_discriminator(head, policy)
    learner = DiscriminatorLearner(made, policy, make_config(*options))
    before = {n: p.detach().clone() for n, p in made.head_parameters().items()}
    learner.update(TRACES, logp_of(learner, TRACES))
    steps = [(p.detach() - before[n]).abs().max() for n, p in made.head_parameters().items()]
    assert max(steps).item() == pytest.approx(rate, rel=1e-2)


def logp_of(learner, traces, temperature=1.0):
    return action_logp(learner.policy, traces, 4096, temperature)


def state_of(discriminator):
    return {n: p.detach().clone() for n, p in discriminator.trainable().items()}


def test_the_throttle_skips_updates_while_the_accuracy_is_above_it():
    policy = make_policy()
    discriminator = make_discriminator("shaped", policy)
    config = make_config(
        "discriminator.accuracy_throttle=0.6", "discriminator.logit=f", "algorithm.reward=f"
    )
    learner = DiscriminatorLearner(discriminator, policy, config)
    running = 0.5
    assert learner.accuracy == running
    throttled = []
    for accuracy in (0.9, 0.9, 0.9, 0.9, 0.0, 0.0, 0.0):
        learner.accuracy = running
        before = state_of(discriminator)
        optimiser_before = learner.optimiser.updates
        metrics = learner.update(TRACES, logp_of(learner, TRACES))
        changed = any(not torch.equal(p, before[n]) for n, p in discriminator.trainable().items())
        throttled.append(running > 0.6)
        assert metrics["disc/throttled"] == float(throttled[-1])
        assert changed != throttled[-1]
        assert learner.optimiser.updates == optimiser_before + (not throttled[-1])
        assert ("disc/grad_norm" in metrics) != throttled[-1]
        assert learner.accuracy == pytest.approx(
            running + 0.1 * (metrics["disc/accuracy"] - running)
        )
        running = running + 0.1 * (accuracy - running)
    assert any(throttled)
    assert not all(throttled)


def test_one_class_alone_is_no_error():
    policy = make_policy()
    discriminator = make_discriminator("lm", policy)
    learner = DiscriminatorLearner(discriminator, policy, make_config())
    traces = [t for t in TRACES if t.source != Source.EXPERT]
    metrics = learner.update(traces, logp_of(learner, traces))
    assert metrics["disc/accuracy_expert"] == 0.0
    assert metrics["disc/loss"] > 0


def test_the_discriminators_state_comes_back():
    policy = make_policy()
    config = make_config("discriminator.replay=5", "discriminator.replay_fraction=0.5")
    learner = DiscriminatorLearner(make_discriminator("lm", policy), policy, config)
    learner.replay.add([t for t in TRACES if t.source == Source.POLICY])
    learner.update(TRACES, logp_of(learner, TRACES))
    tensors, state = learner.state()
    tensors = {n: t.clone() for n, t in tensors.items()}
    other = DiscriminatorLearner(make_discriminator("lm", policy), policy, config)
    other.restore(tensors, state)
    assert other.accuracy == learner.accuracy
    assert other.replay.traces == learner.replay.traces
    for _ in range(2):
        assert learner.update(TRACES, logp_of(learner, TRACES)) == other.update(
            TRACES, logp_of(other, TRACES)
        )
    theirs = other.discriminator.trainable()
    assert all(torch.equal(p, theirs[n]) for n, p in learner.discriminator.trainable().items())
