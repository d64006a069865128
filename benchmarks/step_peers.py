"""The same AIRL step padded and unfused, in plain torch: what a trainer without packing does.

B traces, W columns of completions. Every prompt is repeated for each of its completions, every
row is padded, the logits of the completions' columns are materialised, log_softmax and gather
take the log-probabilities, and autograd differentiates it all. Spans are of one token, so that
rewards, advantages and losses are rectangles as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from airl_fast.attention import standard_attention
from airl_fast.packing import Source
from benchmarks.harness import Outputs, Prepared
from benchmarks.padded import Rectangle, alone, log_probs, padding, rectangle, rows_a_pass
from benchmarks.step_inputs import Laps, StepInputs, StepResult, kept_gradients

_EPSILON = 1e-6  # of the division by the deviation


def padded_step(inputs: StepInputs, fixed: bool) -> Prepared:
    """The step with all rows padded to the longest of a step, or to the fixed length."""
    device = inputs.policy.device
    left, width = padding(inputs.traces, fixed)
    rows = rows_a_pass(device)[fixed]
    whole = rectangle(inputs.everything, left, width, device)
    count = len(inputs.traces.policy)
    own = Rectangle(whole.ids[:count], whole.mask[:count], width)
    return _prepared(inputs, list(whole.split(rows)), list(own.split(rows)), whole)


def alone_step(inputs: StepInputs) -> Prepared:
    """The step one trace at a time, so that nothing is padded: what the others are held to."""
    device = inputs.policy.device
    left, width = padding(inputs.traces, False)
    batches = [(slice(i, i + 1), alone(t, device)) for i, t in enumerate(inputs.everything)]
    own = batches[: len(inputs.traces.policy)]
    return _prepared(inputs, batches, own, rectangle(inputs.everything, left, width, device))


Batches = list[tuple[slice, Rectangle]]


def _prepared(inputs: StepInputs, batches: Batches, own: Batches, whole: Rectangle) -> Prepared:
    real = whole.actions
    count = len(inputs.traces.policy)

    def call() -> StepResult:
        with standard_attention(inputs.policy.model), standard_attention(_trunk(inputs)):
            return _step(inputs, batches, own, real)

    def read(result: StepResult) -> Outputs:
        found = dict(result.outputs)
        return {
            **found,
            "logp": found["logp"][real],
            "f": found["f"][real[:count]],
            "advantages": found["advantages"][real[:count]],
        }

    return Prepared(call, read, inputs.reset, lambda result: result.seconds)


def _trunk(inputs: StepInputs) -> LlamaForCausalLM:
    assert inputs.discriminator.body is not None
    return inputs.discriminator.body.model


def _step(inputs: StepInputs, batches: Batches, own: Batches, real: Tensor) -> StepResult:
    laps, disc = Laps(), inputs.discriminator
    policy, trunk = inputs.policy.model, _trunk(inputs)
    logp = _scored(lambda rows: log_probs(policy, rows), batches, real)
    laps.add("scoring")
    with kept_gradients(inputs.disc_learner.optimiser, inputs.samples) as disc_gradients:
        disc_loss, disc_norm = _update_discriminator(inputs, batches, real, logp)
    laps.add("discriminator update")
    mine = real[: len(inputs.traces.policy)]
    f = _scored(lambda rows: disc.kappa * log_probs(trunk, rows) + disc.offset, own, mine)
    advantages = _advantages(inputs, f, mine)
    laps.add("scoring")
    with kept_gradients(inputs.policy_learner.optimiser, inputs.samples) as policy_gradients:
        policy_loss, policy_norm = _update_policy(inputs, own, mine, advantages)
    laps.add("policy update")
    outputs = {
        "logp": logp,
        "f": f,
        "advantages": advantages,
        "losses": torch.tensor([disc_loss, policy_loss]),
        "gradient norms": torch.tensor([disc_norm, policy_norm]),
        "discriminator gradients": torch.cat(disc_gradients),
        "policy gradients": torch.cat(policy_gradients),
    }
    return StepResult(outputs, laps.seconds)


@torch.no_grad()
def _scored(score: Callable[[Rectangle], Tensor], batches: Batches, real: Tensor) -> Tensor:
    """[B, W] scores, zero where padded."""
    pieces = [(part, score(rows)) for part, rows in batches]
    result = pieces[0][1].new_zeros(real.shape)
    for part, piece in pieces:
        result[part, : piece.shape[1]] = piece
    return result.masked_fill_(~real, 0.0)


def _update_discriminator(
    inputs: StepInputs, batches: Batches, real: Tensor, logp: Tensor
) -> tuple[float, float]:
    """Binary cross-entropy on f - log pi with smoothed labels; each class weighs half."""
    disc, smoothing = inputs.discriminator, inputs.config.discriminator.label_smoothing
    trunk = _trunk(inputs)
    is_expert = torch.tensor(
        [[t.source == Source.EXPERT] for t in inputs.everything], device=logp.device
    )
    labels = is_expert.to(logp.dtype) * (1 - smoothing) + smoothing / 2
    counts = torch.where(is_expert, (real & is_expert).sum(), (real & ~is_expert).sum())
    weights = 0.5 * real / counts
    total = 0.0
    for part, rows in batches:
        f = disc.kappa * log_probs(trunk, rows) + disc.offset
        columns = f.shape[1]
        loss = functional.binary_cross_entropy_with_logits(
            f - logp[part, :columns],
            labels[part].expand_as(f),
            weight=weights[part, :columns],
            reduction="sum",
        )
        loss.backward()
        total += float(loss.detach())
    return total, inputs.disc_learner.optimiser.step()


def _advantages(inputs: StepInputs, f: Tensor, real: Tensor) -> Tensor:
    """Reward to go, less its mean over the group at the same place, over the group's deviation.

    A trace that has ended counts as 0 in the mean; the deviation is that of all tokens of a group.
    """
    algorithm = inputs.config.algorithm
    to_go = torch.zeros_like(f)
    following = torch.zeros_like(f[:, 0])
    for column in reversed(range(f.shape[1])):
        following = f[:, column] + algorithm.gamma * following
        to_go[:, column] = following
    advantages = torch.zeros_like(f)
    groups = torch.tensor([trace.group for trace in inputs.traces.policy], device=f.device)
    for group in groups.unique():
        rows = groups == group
        deviation = to_go[rows][real[rows]].std(correction=0)
        advantages[rows] = (to_go[rows] - to_go[rows].mean(0)) / (deviation + _EPSILON)
    limit = algorithm.advantage_clip
    assert limit is not None
    return advantages.clamp(-limit, limit).masked_fill(~real, 0.0)


def _update_policy(
    inputs: StepInputs, own: Batches, real: Tensor, advantages: Tensor
) -> tuple[float, float]:
    """The clipped policy-gradient loss, averaged over all tokens."""
    algorithm, model = inputs.config.algorithm, inputs.policy.model
    tokens, total = real.sum(), 0.0
    for part, rows in own:
        logp = log_probs(model, rows)
        columns = logp.shape[1]
        ratio = (logp - logp.detach()).exp()
        clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        gain = advantages[part, :columns]
        loss = -torch.minimum(ratio * gain, clipped * gain)
        loss = (loss * real[part, :columns]).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    return total, inputs.policy_learner.optimiser.step()
