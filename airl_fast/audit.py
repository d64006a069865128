"""Every so many steps, the operators of a run against plain torch in float32, on the run's batch.

One micro-batch of the step goes through the operators as training calls them (the same one on each
of several processes), and some of its rows through the reference (``ops/dispatch.py``), which is
the operators' definition. Both read the same hidden states: what is compared is the operators, not
the transformer. Tolerances are those that the tests of the operators leave room for, a third of one
percent, and for gradients what rounding.py finds in the reference's own numbers (docs/guards.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from airl_fast.batches import derive_seed
from airl_fast.comparison import AuditError, Comparison
from airl_fast.config import RunConfig
from airl_fast.discriminator import Discriminator
from airl_fast.language_model import Head, LanguageModel
from airl_fast.learners import FORMS, Metrics, PolicyLearner, combine_logp
from airl_fast.ops._head import LinearHead, present
from airl_fast.ops.discriminator_loss import discriminator_loss
from airl_fast.ops.dispatch import backend, serving
from airl_fast.packing import PackedBatch, Source, Trace, pack
from airl_fast.planning import plan_traces
from airl_fast.policy import Policy
from airl_fast.rounding import gradient_rounding

__all__ = ["Audit", "AuditError"]

_ATOL = 2e-4  # log-probs, entropies: float32 logits whatever the inputs
_RTOL = 3e-3  # gradients, before any rounding


class Audit:
    """The audit of one run; a step that is not due costs nothing."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.every = config.guards.audit_every
        self.rows = config.guards.audit_rows

    def due(self, step: int) -> bool:
        """Whether the step after ``step`` finished ones is audited."""
        return self.every > 0 and (step + 1) % self.every == 0

    def policy(
        self,
        step: int,
        learner: PolicyLearner,
        traces: Sequence[Trace],
        advantages: Sequence[Tensor],
        old_logp: Sequence[Tensor] | None = None,
        ref_logp: Sequence[Tensor] | None = None,
    ) -> Metrics:
        """Audit log-prob, entropy and the policy loss's gradients before an update on these.

        Returns:
            ``audit/policy``: the largest difference as a share of its tolerance; empty if not due.

        Raises:
            AuditError: an operator has drifted.
        """
        if not self.due(step):
            return {}
        indices, batch = self._micro_batch(step, traces, learner.policy.device)
        given = (advantages, old_logp, ref_logp)
        constants = [None if x is None else torch.cat([x[i] for i in indices]) for x in given]
        actions = sum(len(trace.completion) for trace in traces)
        with torch.no_grad():
            worst = learner.policy.inside(self._policy, step, learner, batch, constants, actions)
        return {"audit/policy": worst}

    def _policy(
        self,
        step: int,
        learner: PolicyLearner,
        batch: PackedBatch,
        constants: Sequence[Tensor | None],
        actions: int,
    ) -> float:
        """The policy's operators on a micro-batch, where the head is whole."""
        policy = learner.policy
        head, states = _detached(policy.head), policy.hidden(batch)
        read = policy.logprob(states, batch, learner.temperature)
        hidden = states[batch.state_index]
        rows = self._draw(step, len(hidden)).to(hidden.device)
        drawn, of_drawn = batch.targets[rows], [None if x is None else x[rows] for x in constants]
        ends = torch.arange(len(rows) + 1, dtype=torch.int32, device=hidden.device)

        def alone(x: Tensor, head: Head) -> _Results:  # the drawn rows, each a sequence
            return _results(learner, x, head, drawn, ends, of_drawn, actions)

        whole = _results(learner, hidden, head, batch.targets, batch.cu_actions, constants, actions)
        got = whole.at(rows, alone(hidden[rows], head).d_weight)
        with backend("reference"):
            want = alone(hidden[rows].float(), replace(head, weight=head.weight.float()))

        logprob = Comparison("linear_logprob", _backend("linear_logprob", hidden, head))
        loss = Comparison("linear_policy_loss", _backend("linear_policy_loss", hidden, head))
        for found, (logp, entropy) in (
            (logprob, (read[0][rows], read[1][rows])),
            (loss, (got.logp, got.entropy)),
        ):
            found.values("log-prob", logp, want.logp, rows, atol=_ATOL)
            found.values("entropy", entropy, want.entropy, rows, atol=_ATOL)
        rounding = gradient_rounding(
            hidden[rows],
            _linear(head, learner.temperature),
            drawn,
            _of_logp(want.logp, of_drawn, self.config.algorithm.kl_beta) / actions,
            learner.entropy_coef / actions,
            products=_products(hidden, head),
        )
        name = "the gradient at the hidden state"
        _gradients(loss, name, got.d_hidden, want.d_hidden, rows, rounding.hidden)
        if got.d_weight is not None and want.d_weight is not None:
            name, words = "the gradient of the head", torch.arange(len(head.weight))
            _gradients(loss, name, got.d_weight, want.d_weight, words, rounding.weight)
        return max(logprob.worst, loss.worst)

    def discriminator(
        self,
        step: int,
        discriminator: Discriminator,
        policy: Policy,
        traces: Sequence[Trace],
        logp: Sequence[Tensor],
    ) -> Metrics:
        """Audit f and its gradient on spans of some traces, and the discriminator's loss.

        f of a score head is plain torch itself: there the loss alone is audited.

        Returns:
            ``audit/discriminator``, as ``policy`` does.

        Raises:
            AuditError: an operator has drifted.
        """
        if not self.due(step):
            return {}
        indices, batch = self._micro_batch(step, traces, policy.device)
        worst, body = 0.0, discriminator.body
        with torch.no_grad():
            shared = policy.hidden(batch) if discriminator.trunk == "policy" else None
            f = discriminator.f(batch, shared)
            if discriminator.head_kind == "lm" and body is not None:
                given = [traces[i] for i in indices], batch
                worst = body.inside(self._energies, step, discriminator, body, *given)
        how = self.config.discriminator
        of_spans = combine_logp(
            torch.cat([logp[i] for i in indices]), batch.cu_spans, how.span_logp
        )
        of_loss = policy.world.agree(lambda: self._loss(batch, f, of_spans))
        return {"audit/discriminator": max(worst, of_loss)}

    def _energies(
        self,
        step: int,
        discriminator: Discriminator,
        body: LanguageModel,
        traces: Sequence[Trace],
        batch: PackedBatch,
    ) -> float:
        """F of whole traces, at least ``rows`` actions of them where there are as many."""
        chosen: list[int] = []
        for i in self._draw(step, len(traces), all_of_them=True).tolist():
            chosen.append(i)
            if sum(len(traces[i].completion) for i in chosen) >= self.rows:
                break
        hidden = body.hidden(batch)
        actions, spans = _ranges(batch.cu_actions, chosen), _ranges(batch.cu_seq_spans, chosen)
        f, d_hidden = _differentiated(discriminator, batch, hidden, spans)
        # The same states in a batch of the chosen traces alone, for the reference.
        alone = pack([traces[i] for i in chosen], device=hidden.device)
        states = hidden.new_zeros(len(alone.input_ids), hidden.shape[1], dtype=torch.float32)
        read = batch.state_index[actions]
        states[alone.state_index] = hidden[read].float()
        with backend("reference"):
            want_f, want_d = _differentiated(discriminator, alone, states, slice(None))
        head = _detached(body.head)
        lengths = batch.cu_spans.diff()[spans]
        kappa = max(1.0, abs(float(discriminator.kappa.detach())))
        tokens = lengths if discriminator.span_logp == "sum" else torch.ones_like(lengths)
        reading = Comparison("linear_logprob", _backend("linear_logprob", hidden, head))
        reading.values("f", f, want_f, spans, atol=_ATOL * kappa * tokens)
        read_alone = alone.state_index
        of_logp = kappa / (1 if discriminator.span_logp == "sum" else lengths)
        of_actions = gradient_rounding(
            hidden[read],
            _linear(head),
            alone.targets,
            (states.new_ones(len(lengths)) * of_logp).repeat_interleave(lengths),
            products=_products(hidden, head),
        ).hidden
        rounding = states.new_zeros(len(states)).index_add(0, read_alone, of_actions)[read_alone]
        name = "linear_logprob_backward"
        training = Comparison(name, _backend(name, hidden, head))
        name = "the gradient of f at the hidden state"
        _gradients(training, name, d_hidden[read], want_d[read_alone], read, rounding)
        return max(reading.worst, training.worst)

    def _loss(self, batch: PackedBatch, f: Tensor, logp: Tensor) -> float:
        how = self.config.discriminator
        is_expert = (batch.source == Source.EXPERT).repeat_interleave(batch.cu_seq_spans.diff())

        def results() -> tuple[Tensor, Tensor]:
            leaf = f.detach().requires_grad_()
            with torch.enable_grad():
                loss, _ = discriminator_loss(
                    leaf,
                    logp,
                    is_expert,
                    form=FORMS[how.logit],
                    label_smoothing=how.label_smoothing,
                )
                (gradient,) = torch.autograd.grad(loss, leaf)
            return loss[None], gradient[None]

        loss, gradient = results()
        with backend("reference"):
            want, want_gradient = results()
        one = torch.zeros(1, dtype=torch.int64)
        found = Comparison("discriminator_loss", serving("discriminator_loss", f, logp))
        found.values("the loss", loss, want, one, atol=_ATOL)
        found.gradients(
            "the gradient at f", gradient, want_gradient, one, rtol=3e-3, floor=1e-6 / len(f)
        )
        return found.worst

    def _micro_batch(
        self, step: int, traces: Sequence[Trace], device: torch.device
    ) -> tuple[list[int], PackedBatch]:
        plan = plan_traces(traces, self.config.run.token_budget)
        indices = plan[derive_seed(self.config.run.seed, "audit", step) % len(plan)]
        return indices, pack([traces[i] for i in indices], device=device)

    def _draw(self, step: int, count: int, *, all_of_them: bool = False) -> Tensor:
        """Some of ``count`` positions in ascending order, or all of them in random order."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.run.seed, "rows", step))
        order = torch.randperm(count, generator=generator)
        return order if all_of_them else order[: self.rows].sort().values


class _Results(NamedTuple):
    """What a policy loss gives for its rows."""

    logp: Tensor  # [R]
    entropy: Tensor  # [R]
    d_hidden: Tensor  # [R, D]
    d_weight: Tensor | None  # [V, D]; None: a frozen head

    def at(self, rows: Tensor, d_weight: Tensor | None) -> _Results:
        """Some rows, with the gradient of the head that those alone give."""
        return _Results(self.logp[rows], self.entropy[rows], self.d_hidden[rows], d_weight)


def _results(
    learner: PolicyLearner,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqs: Tensor,
    constants: Sequence[Tensor | None],
    actions: int,
) -> _Results:
    hidden = hidden.detach().requires_grad_()
    trained = learner.policy.head.weight.requires_grad
    head = replace(head, weight=head.weight.detach().requires_grad_(trained))
    with torch.enable_grad():
        loss, stats = learner.loss(hidden, head, targets, cu_seqs, constants, actions)
        loss.backward()
    assert hidden.grad is not None
    return _Results(stats.logp, stats.entropy, hidden.grad, head.weight.grad)


def _of_logp(logp: Tensor, constants: Sequence[Tensor | None], beta: float) -> Tensor:
    """How large d loss / d logp of the rows [R] is, its terms without their signs."""
    advantages, old, ref = constants
    assert advantages is not None
    size = advantages.abs() if old is None else advantages.abs() * (logp - old).exp()
    return size if ref is None else size + beta * (1 + (ref - logp).exp())


def _gradients(
    found: Comparison, name: str, got: Tensor, want: Tensor, rows: Tensor, rounding: Tensor
) -> None:
    """Compare gradients; one in half precision was rounded to it at last."""
    unit = torch.finfo(got.dtype).eps / 2
    found.gradients(name, got, want, rows, rtol=_RTOL + unit, floor=rounding)


def _products(hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype that a backend rounds d logits to: on a CPU float32 whatever it is given."""
    alike = hidden.is_cuda and hidden.dtype == head.weight.dtype
    return hidden.dtype if alike else torch.float32


def _linear(head: Head, temperature: float = 1.0) -> LinearHead:
    return LinearHead(head.weight, head.bias, temperature, head.softcap, head.logit_scale)


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)


def _backend(op: str, hidden: Tensor, head: Head) -> str:
    return serving(op, *present(hidden, head.weight, head.bias))


def _differentiated(
    discriminator: Discriminator, batch: PackedBatch, hidden: Tensor, spans: Tensor | slice
) -> tuple[Tensor, Tensor]:
    """F of spans [R], and the gradient of its sum at the hidden states [T, F]."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        f = discriminator.energies(batch, hidden)[spans]
        (gradient,) = torch.autograd.grad(f.sum(), hidden)
    return f.detach(), gradient


def _ranges(offsets: Tensor, chosen: Sequence[int]) -> Tensor:
    """The rows of some segments, one after the other."""
    edges = offsets.tolist()
    parts = [torch.arange(edges[i], edges[i + 1], device=offsets.device) for i in chosen]
    return torch.cat(parts)
