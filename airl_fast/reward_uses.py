"""What a reward is good for: reranking samples, telling right from wrong, finding the error."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from airl_fast.batches import TraceMaker, encode
from airl_fast.building import load_measured
from airl_fast.config import RunConfig
from airl_fast.discriminator import Discriminator
from airl_fast.evaluation import auc, best_of_n, locate_accuracy, majority_vote
from airl_fast.language_model import LanguageModel
from airl_fast.learners import combine_logp
from airl_fast.measuring import draw
from airl_fast.packing import Source, Trace
from airl_fast.passes import action_logp, offsets, per_trace_sum, span_energies
from airl_fast.spans import span_offsets, span_rule
from airl_fast.tasks import Task, encode_completion, load_task
from airl_fast.validation import Samples, traces_of


@dataclass(frozen=True)
class Uses:
    """A reward beside log pi, on a policy's samples and on planted errors; per test problem.

    Attributes:
        rerank: accuracy of each way to pick one of the samples.
        auc: of f and of log pi, right against wrong samples; empty where all are one or the other.
        locate: hits of each way to find the planted error.
        chance: of a hit.
        traces: some of the planted ones, JSON-able.
    """

    rerank: dict[str, list[float]]
    auc: dict[str, float]
    locate: dict[str, list[float]]
    chance: float
    traces: list[dict[str, Any]]


@dataclass(frozen=True)
class Planted:
    """A correct trace with one wrong step planted, and what each step scores."""

    trace: Trace
    prompt: str
    spans: list[str]
    f: list[float]
    error: int


def use_reward(reward: Path, start: str | Path, config: RunConfig, *, samples: int) -> Uses:
    """Rerank a policy's samples and locate planted errors, by f and by its log pi alone.

    Args:
        reward: folder of a saved reward.
        start: folder or name of the policy: the one that the samples are of, not the one that
            the reward has been used up on.
        config: of the run.
        samples: of each test problem.
    """
    policy = load_measured(start, config)
    discriminator = Discriminator.from_pretrained(reward, device=policy.device)
    task = load_task(config.task)
    drawn = draw(policy, config, "test", samples, 1.0)
    ranked, separated = rerank(discriminator, policy, task, drawn, config)
    located, chance, planted = locate(discriminator, policy, task, config)
    return Uses(ranked, separated, located, chance, show_traces(planted))


def rerank(
    reward: Discriminator, policy: LanguageModel, task: Task, samples: Samples, config: RunConfig
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Accuracy on every problem of picking one of its samples in five ways; AUC of both scores."""
    size = samples.correct.shape[1]
    correct = samples.correct.numpy()
    traces = traces_of(samples, _maker(task, policy))
    budget = config.run.token_budget
    sums = {
        "log pi": per_trace_sum(action_logp(policy, traces, budget)),
        "f": per_trace_sum(span_energies(reward, policy, traces, budget)),
    }
    scores = {name: values.view(-1, size).cpu().numpy() for name, values in sums.items()}
    answers = [task.extract_answer(rollout.text) for rollout in samples.rollouts]
    rows = [answers[i : i + size] for i in range(0, len(answers), size)]
    picks = {
        "random pick": correct.mean(1).tolist(),
        "majority vote": majority_vote(rows, correct).tolist(),
        **{name: best_of_n(correct, s, [size])[:, 0].tolist() for name, s in scores.items()},
        "oracle": correct.max(1).astype(float).tolist(),
    }
    mixed = correct.any() and not correct.all()
    return picks, {name: auc(s, correct) for name, s in scores.items()} if mixed else {}


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
