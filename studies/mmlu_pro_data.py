"""The questions of the study, and four models' answers to each of them, as traces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airl_fast.packing import Source, Trace
from airl_fast.tasks.base import Example, encode_completion, encode_prompt
from airl_fast.tasks.choices import PLAIN, find_choice, format_options, own_text
from airl_fast.tasks.mmlu_pro import Question, parse_question, read_responses
from airl_fast.tasks.rows import compressed_or_not, read_rows

EXPERT = "llama-3.1-70b-instruct"
OTHERS = ("llama-3.1-8b-instruct", "llama-3-8b", "mistral-7b-instruct-v0.2")
MODELS = (EXPERT, *OTHERS)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question with every model's answer, in the order of ``MODELS``."""

    question: Question
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]
    correct: tuple[bool, ...]

    def traces(self, rule: Any, group: int) -> list[Trace]:
        """The answers as traces, cut into spans; the expert's first."""
        return [
            Trace(
                prompt=self.prompt,
                completion=completion,
                span_lengths=rule(completion),
                group=group,
                source=Source.EXPERT if model == EXPERT else Source.POLICY,
            )
            for model, completion in zip(MODELS, self.completions, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Both halves, sub-sampled, and what was left out on the way."""

    train: list[Asked]
    test: list[Asked]
    left_out: dict[str, int]


def load(
    folder: Path,
    tokenizer: Any,
    *,
    train: int,
    test: int,
    max_prompt: int,
    max_completion: int,
    seed: int,
) -> Data:
    """Divide the questions in two halves, then take the first that qualify from each.

    Questions of the same text are in the same half. A question qualifies if all four answers can
    be read and nothing is longer than the limits: so every model is measured on the same ones.

    Args:
        folder: questions.jsonl(.gz) and a file of each model's answers.
        tokenizer: of the discriminator.
        train: questions to train on.
        test: questions to measure on.
        max_prompt: most tokens of a question with its options.
        max_completion: most tokens of an answer, end of text included.
        seed: of the division and of the order.

    Raises:
        ValueError: fewer questions qualify than asked for.
    """
    rows = read_rows(compressed_or_not(folder / "questions.jsonl"))
    questions = [parse_question(row) for row in rows]
    responses = {
        model: dict(read_responses(compressed_or_not(folder / f"{model}.jsonl")))
        for model in MODELS
    }
    texts = sorted({question.text for question in questions})
    random.Random(f"mmlu_pro study/{seed}").shuffle(texts)
    halves = (set(texts[: len(texts) // 2]), set(texts[len(texts) // 2 :]))
    order = sorted(questions, key=lambda question: question.id)
    random.Random(f"mmlu_pro order/{seed}").shuffle(order)
    left_out: Counter[str] = Counter()
    found = []
    for half, count in zip(halves, (train, test), strict=True):
        taken: list[Asked] = []
        for question in order:
            if question.text not in half or len(taken) == count:
                continue
            asked = _asked(question, responses, tokenizer, max_prompt, max_completion)
            if isinstance(asked, str):
                left_out[asked] += 1
            else:
                taken.append(asked)
        if len(taken) < count:
            raise ValueError(
                f"{len(taken)} questions of one half qualify, {count} were asked for; raise "
                "--max-prompt or --max-completion, or ask for fewer"
            )
        found.append(taken)
    return Data(train=found[0], test=found[1], left_out=dict(left_out))


def _asked(
    question: Question,
    responses: dict[str, dict[int, str]],
    tokenizer: Any,
    max_prompt: int,
    max_completion: int,
) -> Asked | str:
    """The question with its answers, or why it does not qualify."""
    text = PLAIN.format(question=question.text, options=format_options(question.options))
    prompt = tuple(encode_prompt(Example(prompt=text), tokenizer))
    if len(prompt) > max_prompt:
        return f"questions of more than {max_prompt} tokens"
    told = [own_text(responses[model].get(question.id, "")) for model in MODELS]
    answers = [find_choice(one, len(question.options)) for one in told]
    unread = [model for model, answer in zip(MODELS, answers, strict=True) if answer is None]
    if unread:
        return f"questions that {unread[0]} gave no readable answer to"
    completions = [tuple(encode_completion(one, tokenizer)) for one in told]
    for model, completion in zip(MODELS, completions, strict=True):
        if len(completion) > max_completion:
            return f"questions that {model} answered in more than {max_completion} tokens"
    return Asked(
        question=question,
        prompt=prompt,
        completions=tuple(completions),
        answers=tuple(str(answer) for answer in answers),
        correct=tuple(answer == question.answer for answer in answers),
    )


def tokens(asked: Sequence[Asked]) -> int:
    """Tokens of these questions, packed: every prompt once."""
    return sum(len(one.prompt) + sum(map(len, one.completions)) for one in asked)
