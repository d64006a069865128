"""What the learned reward is good for in the demo: reranking samples, finding the first error."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from airl_fast.batches import TraceMaker, encode
from airl_fast.config import RunConfig
from airl_fast.evaluation import best_of_n, locate_accuracy, majority_vote
from airl_fast.learners import combine_logp
from airl_fast.loading import LanguageModel
from airl_fast.models import Discriminator
from airl_fast.packing import Source, Trace
from airl_fast.passes import action_logp, offsets, per_trace_sum, span_energies
from airl_fast.spans import span_offsets, span_rule
from airl_fast.tasks import Task, encode_completion
from airl_fast.validation import Samples, traces_of


@dataclass(frozen=True)
class Planted:
    """A correct trace with one wrong step planted, and what each step scores."""

    trace: Trace
    prompt: str
    spans: list[str]
    f: list[float]
    error: int


def rerank(
    reward: Discriminator, policy: LanguageModel, task: Task, samples: Samples, config: RunConfig
) -> dict[str, list[float]]:
    """Accuracy on every problem of picking one of its samples in five ways."""
    size = samples.correct.shape[1]
    correct = samples.correct.numpy()
    traces = traces_of(samples, _maker(task, policy))
    budget = config.run.token_budget
    f = per_trace_sum(span_energies(reward, policy, traces, budget)).view(-1, size)
    logp = per_trace_sum(action_logp(policy, traces, budget)).view(-1, size)
    answers = [task.extract_answer(rollout.text) for rollout in samples.rollouts]
    rows = [answers[i : i + size] for i in range(0, len(answers), size)]
    return {
        "random pick": correct.mean(1).tolist(),
        "majority vote": majority_vote(rows, correct).tolist(),
        "log pi": best_of_n(correct, logp.numpy(), [size])[:, 0].tolist(),
        "f": best_of_n(correct, f.numpy(), [size])[:, 0].tolist(),
        "oracle": correct.max(1).astype(float).tolist(),
    }


def locate(
    reward: Discriminator, policy: LanguageModel, task: Task, config: RunConfig
) -> tuple[dict[str, list[float]], float, list[Planted]]:
    """Hits, per test problem, of the lowest-scoring calculation step being the planted error."""
    maker, budget = _maker(task, policy), config.run.token_budget
    rng = random.Random(config.run.seed)
    traces, errors = [], []
    problems = encode(task.test, policy.tokenizer)
    for i, problem in enumerate(problems):
        assert problem.example.completion is not None
        text, error = task.corrupt(problem.example.completion, rng)
        completion = tuple(encode_completion(text, policy.tokenizer))
        traces.append(maker.trace(problem, completion, Source.PERTURBED, i))
        errors.append(error)
    f = [values.tolist() for values in span_energies(reward, policy, traces, budget)]
    logp = [
        combine_logp(values, offsets(trace.span_lengths, values.device), "sum").tolist()
        for trace, values in zip(traces, action_logp(policy, traces, budget), strict=True)
    ]
    # The last span repeats the answer: it is no step.
    by_f, by_logp = (locate_accuracy([row[:-1] for row in rows], errors) for rows in (f, logp))
    planted = [
        Planted(trace, str(problem.example.prompt), _texts(trace, policy.tokenizer), row, error)
        for problem, trace, row, error in zip(problems, traces, f, errors, strict=True)
    ]
    hits = {"log pi": by_logp.hits.tolist(), "f": by_f.hits.tolist()}
    return hits, float(np.mean(by_f.chance)), planted


def show_traces(planted: list[Planted], count: int = 6) -> list[dict[str, Any]]:
    """The first traces in JSON-able form, for the report."""
    return [
        {"prompt": p.prompt, "spans": p.spans, "f": p.f, "error": p.error} for p in planted[:count]
    ]


def _maker(task: Task, policy: LanguageModel) -> TraceMaker:
    rule = span_rule("step", boundary=task.step_boundary, tokenizer=policy.tokenizer)
    return TraceMaker(task, policy.tokenizer, rule)


def _texts(trace: Trace, tokenizer: Any) -> list[str]:
    places = span_offsets(trace.completion, trace.span_lengths, tokenizer)
    text = tokenizer.decode(trace.completion)
    return [text[start:end] for start, end in places]
