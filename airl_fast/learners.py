"""One update of the discriminator, one update of the policy.

Both run over micro-batches whose losses add up to that of the whole batch, so that loss and
gradient do not depend on how it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from airl_fast.batches import Replay
from airl_fast.config import RunConfig
from airl_fast.discriminator import Discriminator
from airl_fast.language_model import Head, LanguageModel
from airl_fast.negatives import told_apart
from airl_fast.ops._deferred import raise_failed
from airl_fast.ops.discriminator_loss import discriminator_loss
from airl_fast.ops.linear_policy_loss import PolicyLossStats, linear_policy_loss
from airl_fast.ops.segments import segment_mean, segment_sum
from airl_fast.optimisation import Optimiser
from airl_fast.packing import PackedBatch, Source, Trace
from airl_fast.passes import micro_batches, offsets, span_energies
from airl_fast.transfers import Readings, sent
from airl_fast.weights import copy_parameters, swapped

Metrics = dict[str, float]
FORMS: dict[str, Literal["airl", "logit", "wgan"]] = {
    "f-logp": "airl",
    "f": "logit",
    "wgan": "wgan",
}


_KINDS = {True: "expert", False: "policy"}
_TOLD = (
    "loss",
    "accuracy_expert",
    "accuracy_policy",
    "f_expert",
    "f_policy",
    "logit",
    "logp_floored",
)


def combine_logp(logp: Tensor, cu_spans: Tensor, how: str) -> Tensor:
    """log pi of spans [S] from that of their actions [N]: their sum, or their mean."""
    return segment_mean(logp, cu_spans) if how == "mean" else segment_sum(logp, cu_spans)


class _Class(NamedTuple):
    """Experts, or what they are told from, in one micro-batch."""

    is_expert: bool
    rows: Tensor  # its spans among those of the batch, int64
    share: float  # of the class's spans, times the weight of the micro-batch
    weight: float  # of one span's number in the class's mean


class DiscriminatorLearner:
    """Trains f so that sigmoid(f - log pi) tells experts from everything else.

    Attributes:
        accuracy: running mean of the two classes' mean accuracy; starts at one half.
        replay: past policy traces, drawn again as negatives.
        average: the moving average of the weights; empty without ``ema_decay``.
    """

    def __init__(
        self, discriminator: Discriminator, policy: LanguageModel, config: RunConfig
    ) -> None:
        self.discriminator = discriminator
        self.policy = policy
        self.config = config.discriminator
        self.token_budget = config.run.token_budget
        self.replay = Replay(self.config.replay)
        self.accuracy = 0.5
        self.average: dict[str, Tensor] = {}
        self.restart_average()
        head = discriminator.head_parameters()
        body = {k: p for k, p in discriminator.trainable().items() if k not in head}
        steps = config.warmup_steps + config.run.steps
        self.optimiser = Optimiser(
            body,
            head=head,
            learning_rate=self.config.learning_rate,
            head_learning_rate=self.config.head_rate,
            weight_decay=self.config.weight_decay,
            betas=self.config.betas,
            clip_norm=self.config.clip_norm,
            updates=steps * self.config.updates_per_step,
            final_fraction=self.config.final_lr_fraction,
            world=policy.world,
        )

    def update(self, traces: Sequence[Trace], logp: Sequence[Tensor]) -> Metrics:
        """One step on these traces, skipped while the running accuracy is above the throttle.

        Args:
            traces: experts, and what they are told from.
            logp: log pi of every action of every trace, under the policy as it is now.
        """
        throttled = self.accuracy > self.config.accuracy_throttle
        with torch.set_grad_enabled(not throttled):
            metrics = self._loss(traces, logp)
        metrics["disc/throttled"] = float(throttled)
        if not throttled:
            metrics["disc/grad_norm"] = self.optimiser.step()
            self._follow()
        # Last, so that an update that is refused leaves the throttle as it was.
        self.accuracy += 0.1 * (metrics["disc/accuracy"] - self.accuracy)
        return metrics

    def _loss(self, traces: Sequence[Trace], action_logp: Sequence[Tensor]) -> Metrics:
        """Each class weighs half, however many spans it has; a critic's means weigh one each.

        The ranking loss crosses micro-batches: its gradient at the trace's scores is taken first,
        for all of them, and then goes through each micro-batch as a constant.
        """
        taught = told_apart(traces, self.config.perturbed_spans)
        spans = {True: 0, False: 0}
        for trace, mask in zip(traces, taught, strict=True):
            spans[trace.source == Source.EXPERT] += sum(mask)
        told = Readings(_TOLD)
        self.optimiser.clear()
        slopes, ranking = self._ranking(traces, action_logp)
        for indices, batch, weight in micro_batches(traces, self.token_budget, self.policy):
            logp = torch.cat([action_logp[i] for i in indices])
            exact = combine_logp(logp, batch.cu_spans, self.config.span_logp)
            logp = self._floored(exact)
            told.add(weight, logp_floored=(logp != exact).sum())
            f = self.discriminator.f(batch, self._policy_hidden(batch))
            classes = _classes(
                [(traces[i].source == Source.EXPERT, taught[i]) for i in indices], spans, weight
            )
            loss = self.policy.world.agree(partial(self._both_classes, f, logp, classes, told))
            told.add(loss=loss)
            if loss.requires_grad:
                if slopes is not None:
                    scores = segment_sum(self._logits(f, logp), batch.cu_seq_spans)
                    mine = sent(torch.tensor(indices), slopes.device)
                    loss = loss + weight * (slopes[mine] * scores).sum()
                loss.backward()
                self.optimiser.collect()
        metrics = {f"disc/{name}": value for name, value in told.totals().items()}
        self.policy.world.agree(raise_failed)  # whatever a GPU has found until here
        metrics["disc/accuracy"] = 0.5 * sum(metrics[f"disc/accuracy_{k}"] for k in _KINDS.values())
        metrics = self.policy.world.totals(metrics) | ranking
        head = self.discriminator.head_parameters()
        return metrics | {f"disc/{k[5:]}": p.item() for k, p in head.items() if p.numel() == 1}

    def _both_classes(
        self, f: Tensor, logp: Tensor, classes: Sequence[_Class], told: Readings
    ) -> Tensor:
        """The loss of a micro-batch; what else is told of it is added to ``told``."""
        whole = 1.0 if self.config.logit == "wgan" else 0.5
        losses = []
        for is_expert, rows, share, weight in classes:
            rows = sent(rows, f.device)
            own_f, own_logp = f[rows], logp[rows]
            loss, stats = discriminator_loss(
                own_f,
                own_logp,
                torch.full_like(rows, is_expert, dtype=torch.bool),
                form=FORMS[self.config.logit],
                label_smoothing=self.config.label_smoothing,
            )
            losses.append(whole * share * loss)
            logits = self._logits(own_f, own_logp)
            if self.config.logit_penalty:
                losses.append(0.5 * share * self.config.logit_penalty * logits.square().mean())
            kind = _KINDS[is_expert]
            told.add(share, **{f"accuracy_{kind}": stats.accuracy})
            told.add(weight, **{f"f_{kind}": own_f.sum()})
            told.add(0.5 * weight, logit=logits.abs().sum())
        return torch.stack(losses).sum()

    def _floored(self, logp: Tensor) -> Tensor:
        floor = self.config.logp_floor
        return logp if floor is None else logp.clamp(min=floor)

    def _logits(self, f: Tensor, logp: Tensor) -> Tensor:
        """What is high for experts: f - log pi, or f alone."""
        return f - logp if self.config.logit == "f-logp" else f

    def _ranking(
        self, traces: Sequence[Trace], action_logp: Sequence[Tensor]
    ) -> tuple[Tensor | None, Metrics]:
        """The gradient [B] of ``pair_weight`` times the ranking loss at the traces' scores.

        A score is the sum of a trace's logits; the loss is the mean of -log sigmoid(expert's -
        other's) over all pairs of one prompt: Bradley-Terry, and with f - log pi the ranking form
        of noise-contrastive estimation (Ma and Collins 2018, arXiv 1809.01812).
        """
        if not self.config.pair_weight:
            return None, {}
        energies = span_energies(self.discriminator, self.policy, traces, self.token_budget)
        scores = []
        for trace, f, logp in zip(traces, energies, action_logp, strict=True):
            spans = offsets(trace.span_lengths, logp.device)
            logp = combine_logp(logp, spans, self.config.span_logp)
            scores.append(self._logits(f, self._floored(logp)).sum())
        experts: dict[tuple[int, ...], list[int]] = {}
        for i, trace in enumerate(traces):
            if trace.source == Source.EXPERT:
                experts.setdefault(trace.prompt, []).append(i)
        pairs = [
            (e, i)
            for i, trace in enumerate(traces)
            if trace.source != Source.EXPERT
            for e in experts.get(trace.prompt, ())
        ]
        if not pairs:
            return None, {}
        score = torch.stack(scores)
        expert, other = torch.tensor(pairs, device=score.device).T
        ahead = score[expert] - score[other]
        slope = -self.config.pair_weight * torch.sigmoid(-ahead) / len(pairs)
        slopes = torch.zeros_like(score).index_add(0, expert, slope).index_add(0, other, -slope)
        return slopes, {
            "disc/pair_loss": float(softplus(-ahead).mean()),
            "disc/pair_accuracy": float((ahead > 0).float().mean()),
        }

    def restart_average(self) -> None:
        """The moving average begins at the weights as they are now."""
        if self.config.ema_decay:
            trainable = self.discriminator.trainable()
            self.average = {name: p.detach().float().clone() for name, p in trainable.items()}

    @torch.no_grad()
    def _follow(self) -> None:
        trainable = self.discriminator.trainable()
        for name, value in self.average.items():
            value.lerp_(trainable[name].detach().to(value.dtype), 1 - self.config.ema_decay)

    def scoring(self) -> AbstractContextManager[None]:
        """Within it, f is that of the moving average where there is one."""
        return swapped(self.discriminator, self.average) if self.average else nullcontext()

    @torch.no_grad()
    def _policy_hidden(self, batch: PackedBatch) -> Tensor | None:
        """What f is read from where the discriminator has no trunk of its own."""
        return self.policy.hidden(batch) if self.discriminator.trunk == "policy" else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values for a checkpoint."""
        tensors, optimiser = self.optimiser.state("disc_adamw")
        tensors |= {f"disc.{k}": p.detach() for k, p in self.discriminator.trainable().items()}
        tensors |= {f"disc_average.{k}": value for k, value in self.average.items()}
        values = {
            "optimiser": optimiser,
            "accuracy": self.accuracy,
            "replay": self.replay.state(),
        }
        return tensors, values

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Set what ``state`` gave."""
        copy_parameters(self.discriminator.trainable(), tensors, "disc.")
        copy_parameters(self.average, tensors, "disc_average.")
        self.optimiser.restore(tensors, state["optimiser"], "disc_adamw")
        self.accuracy = state["accuracy"]
        self.replay.restore(state["replay"])


def _classes(
    taught: Sequence[tuple[bool, Sequence[bool]]], spans: dict[bool, int], weight: float
) -> list[_Class]:
    """The classes that a micro-batch has spans of.

    Args:
        taught: of each trace, whether it is an expert's and which of its spans count.
        spans: of each class in the whole batch.
        weight: of the micro-batch.
    """
    kept = np.concatenate([mask for _, mask in taught])
    experts = np.repeat([is_expert for is_expert, _ in taught], [len(mask) for _, mask in taught])
    classes = []
    for is_expert in (True, False):
        rows = torch.from_numpy(np.flatnonzero(kept & (experts == is_expert)))
        if len(rows):
            every = spans[is_expert]
            classes.append(_Class(is_expert, rows, weight * len(rows) / every, weight / every))
    return classes


class PolicyLearner:
    """Improves the policy on given advantages.

    With ``imitation`` and advantage one that is plain cross-entropy, whatever temperature the
    policy is sampled at and whatever its entropy is worth.
    """

    def __init__(
        self,
        policy: LanguageModel,
        config: RunConfig,
        optimiser: Optimiser,
        *,
        imitation: bool = False,
    ) -> None:
        self.policy = policy
        self.config = config.algorithm
        self.temperature = 1.0 if imitation else config.sampling.temperature
        self.entropy_coef = 0.0 if imitation else config.algorithm.entropy_coef
        self.token_budget = config.run.token_budget
        self.optimiser = optimiser

    def update(
        self,
        traces: Sequence[Trace],
        advantages: Sequence[Tensor],
        old_logp: Sequence[Tensor] | None = None,
        ref_logp: Sequence[Tensor] | None = None,
    ) -> Metrics:
        """One step: the mean over all actions of the clipped policy-gradient loss."""
        actions = sum(len(trace.completion) for trace in traces)
        told = Readings(("loss", "entropy", "logp", "clip_fraction", "kl_old", "kl_ref"))
        given = (advantages, old_logp, ref_logp)
        self.optimiser.clear()
        for indices, batch, weight in micro_batches(traces, self.token_budget, self.policy):
            constants = [None if x is None else torch.cat([x[i] for i in indices]) for x in given]
            loss, stats = self.policy.inside(self._loss_of, batch, constants, actions)
            (weight * loss).backward()
            self.optimiser.collect()
            share = weight * batch.num_actions / actions
            told.add(weight, loss=loss)
            told.add(weight / actions, logp=stats.logp.sum())
            told.add(
                share,
                entropy=stats.entropy_mean,
                clip_fraction=stats.clip_fraction,
                kl_old=stats.kl_old,
                kl_ref=stats.kl_ref,
            )
        metrics = {f"policy/{name}": value for name, value in told.totals().items()}
        metrics = self.policy.world.totals(metrics)
        metrics["policy/grad_norm"] = self.optimiser.step()
        return metrics

    def _loss_of(
        self, batch: PackedBatch, constants: Sequence[Tensor | None], actions: int
    ) -> tuple[Tensor, PolicyLossStats]:
        hidden = self.policy.hidden(batch)[batch.state_index]
        return self.loss(
            hidden, self.policy.head, batch.targets, batch.cu_actions, constants, actions
        )

    def loss(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        cu_seqs: Tensor,
        constants: Sequence[Tensor | None],
        actions: int,
    ) -> tuple[Tensor, PolicyLossStats]:
        """The share of some rows in the loss: ``linear_policy_loss`` as this learner calls it.

        Args:
            hidden: [N, D] where the actions are predicted.
            head: the policy's.
            targets: [N] the actions.
            cu_seqs: [B + 1] offsets of the sequences.
            constants: advantages [N], old and reference log-probs ([N] or None).
            actions: of the whole batch, which the loss is a mean over.
        """
        advantages, old_logp, ref_logp = constants
        assert advantages is not None
        return linear_policy_loss(
            hidden,
            head.weight,
            targets,
            advantages,
            cu_seqs=cu_seqs,
            old_logp=old_logp,
            ref_logp=ref_logp,
            temperature=self.temperature,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            delta=self.config.delta,
            beta=self.config.kl_beta if ref_logp is not None else 0.0,
            entropy_coef=self.entropy_coef,
            aggregation="constant",
            normaliser=float(actions),
            **head.arguments(),
        )
