"""One update of each learner against the oracle, however the batch is cut."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from airl_fast.config import load_config
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.learners import (
    DiscriminatorLearner,
    PolicyLearner,
    combine_logp,
    copy_parameters,
)
from airl_fast.models import Discriminator
from airl_fast.optimisation import Optimiser
from airl_fast.packing import Source, Trace, pack
from airl_fast.passes import action_logp
from tests import oracle
from tests.tiny_models import VOCAB, tiny_model, tiny_tokenizer

BUDGETS = [4096, 40, 23]  # one micro-batch; a few; about one a trace


def make_policy(seed=0):
    model = tiny_model("llama", seed=seed).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    return LanguageModel(model, tiny_tokenizer(), Origin(model="tiny"))


def make_discriminator(head, policy):
    if head == "policy-trunk":
        made = Discriminator(None, head="score", trunk="policy", width=32)
    elif head == "shaped":
        made = Discriminator(make_policy(3), head="score", trunk="own", width=32, shaping_gamma=0.9)
    else:
        span_logp = "mean" if head == "lm-mean" else "sum"
        body = make_policy(3)
        made = Discriminator(body, head="lm", trunk="own", width=32, span_logp=span_logp)
    with torch.no_grad():
        for i, p in enumerate(made.head_parameters().values()):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return made


def make_traces():
    """Two groups with an expert each, and a perturbed expert; prompts are shared."""
    generator = torch.Generator().manual_seed(8)

    def draw(n):
        return tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist())

    prompts = [draw(6), draw(4)]
    shapes = [
        (0, (3, 2), Source.EXPERT),
        (1, (2, 2, 1), Source.EXPERT),
        (0, (4, 1, 2), Source.POLICY),
        (0, (6,), Source.POLICY),
        (1, (1, 1, 1), Source.POLICY),
        (1, (2, 5), Source.POLICY),
        (1, (2, 3), Source.PERTURBED),
    ]
    return [
        Trace(
            prompt=prompts[group],
            completion=draw(sum(spans)),
            span_lengths=spans,
            group=group,
            source=source,
        )
        for group, spans, source in shapes
    ]


TRACES = make_traces()


def make_config(*overrides):
    return load_config(
        "arithmetic",
        [
            "run.output_dir=unused",
            "discriminator.label_smoothing=0",
            "discriminator.final_lr_fraction=1",
            "algorithm.reward=f",
            *overrides,
        ],
    )


class Spy:
    """Stands for an optimiser: keeps the gradient it would use."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.gradients = []

    def step(self):
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in self.parameters.items()}
        )
        for p in self.parameters.values():
            p.grad = None
        return 0.0


def assert_gradients(found, expected, rtol=2e-4):
    assert set(found) == set(expected)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            scale = max(value.abs().max().item(), 1e-3)
            torch.testing.assert_close(found[name], value, atol=rtol * scale, rtol=0, msg=name)


def gradients(loss, parameters):
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, values, strict=True))


def alone(model, trace):
    """The hidden states of a trace run alone: at each state and at each action."""
    ids = torch.tensor([[*trace.prompt, *trace.completion]])
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
    start = len(trace.prompt)
    return hidden[start - 1 : -1], hidden[start:]


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


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


def expected_disc_loss(discriminator, policy, logit, *, smoothing=0.0, floor=None, temperature=1.0):
    """Loss and statistics from the oracle, one trace at a time."""
    energies, logps = expected_energies(discriminator, policy, temperature)
    labels = [torch.full((len(t.span_lengths),), t.source == Source.EXPERT) for t in TRACES]
    f, logp, is_expert = torch.cat(energies), torch.cat(logps), torch.cat(labels)
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


# The policy


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
