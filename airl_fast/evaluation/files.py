"""``airl-fast eval``: score a file of judged traces, measure, and write numbers, a table, plots."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airl_fast.encoding import EncodedPair
from airl_fast.evaluation.measure import JudgedTrace, measure
from airl_fast.evaluation.summary import summarise
from airl_fast.evaluation.table import markdown
from airl_fast.ranking import AnswerReader
from airl_fast.readers import Candidates, Format, Reading, Steps
from airl_fast.scores import known
from airl_fast.tasks import TASKS, task_class
from airl_fast.tasks.answers import canonical, find_answer
from airl_fast.tasks.choices import find_choice

if TYPE_CHECKING:
    from airl_fast.scorer import RewardScorer
    from airl_fast.scores import Scored

_CHUNK = 64  # traces scored between two signs of progress
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """One completion of a row, before it is scored."""

    item: Candidates | Steps
    index: int  # among the row's completions
    prompt: int


def evaluate_file(
    load: Callable[[], RewardScorer],
    source: Path,
    target: Path,
    *,
    format: Format = "jsonl",
    end_of_text: bool = True,
    max_tokens: int | None = None,
    plots: bool = True,
    seed: int = 0,
    say: Say = print,
) -> dict[str, Any]:
    """Write metrics.json, metrics.md and, if asked for, PNG plots into a folder.

    Args:
        load: makes the scorer, once the rows are known to be well formed.
        source: see ``readers.Reading``.
        target: the folder; made if it does not exist.
        format: of the rows.
        end_of_text: as ``RewardScorer.score``.
        max_tokens: longer traces (prompt and completion) are left out and counted; None: a trace
            longer than the model's context is an error.
        plots: draw them; needs the report extra.
        seed: of intervals, folds and subsets.
        say: shows progress and what was left out.

    Returns:
        The metrics, as written: those of ``measure``, with ``source``, ``dropped``, and the section
        that ``airl-fast report --eval`` shows of them.

    Raises:
        ValueError: a malformed row or one that cannot be scored, with its line; nothing to
            measure; or plots without matplotlib.
    """
    if plots:
        from airl_fast.evaluation.plots import require

        require()
    # Three times through the file, so that no rows are held: checked, encoded, scored.
    reading = Reading(source, format)
    items = sum(1 for _ in reading)
    dropped = Counter({f"rows {reason}": count for reason, count in reading.dropped.items()})
    say(f"{source}: {reading.rows} rows" + _listed(dropped))
    if not items:
        raise ValueError(f"{source}: every row was left out{_listed(dropped)}; nothing to measure")
    scorer = load()
    total = sum(1 for _ in _encoded(scorer, reading, end_of_text, max_tokens, dropped))
    encoded = _encoded(scorer, reading, end_of_text, max_tokens, Counter())
    judged = list(_judged(scorer, encoded, total, say))
    measured = measure(judged, seed=seed)
    metrics = {
        "source": {"file": source.name, "format": format, "rows": reading.rows, "seed": seed},
        "trained": {
            "granularity": scorer.trained.granularity,
            "logit": scorer.trained.logit,
            "task": scorer.trained.task,
        },
        "dropped": dict(dropped),
        **measured,
        "report": summarise(source.name, measured, judged).to_json(),
    }
    metrics = _finite(metrics)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    _write(target / "metrics.md", markdown(metrics))
    if plots:
        from airl_fast.evaluation.plots import draw

        draw(metrics, target)
    return metrics


def _encoded(
    scorer: RewardScorer,
    items: Iterable[Candidates | Steps],
    end_of_text: bool,
    max_tokens: int | None,
    dropped: Counter[str],
) -> Iterator[tuple[_Trace, EncodedPair]]:
    """Encode every completion of every row, but for those that are too long."""
    prompts: dict[bytes, int] = {}
    for item in items:
        text = json.dumps(item.prompt, sort_keys=True).encode()
        number = prompts.setdefault(blake2b(text, digest_size=16).digest(), len(prompts))
        found: list[Any] = [list(item.steps)] if isinstance(item, Steps) else list(item.completions)
        for i, completion in enumerate(found):
            long = max_tokens is not None and _least(scorer, item, completion) > max_tokens
            if not long:
                try:
                    pair = scorer.encode(item.prompt, completion, end_of_text=end_of_text)
                except ValueError as error:
                    raise ValueError(f"{item.where}: {error}") from error
                tokens = len(pair.prompt) + len(pair.completion)
                long = max_tokens is not None and tokens > max_tokens
            if long:
                dropped[f"traces of more than {max_tokens} tokens"] += 1
                continue
            yield _Trace(item=item, index=i, prompt=number), pair


def _least(scorer: RewardScorer, item: Candidates | Steps, completion: Any) -> int:
    """No more tokens than the trace has: those of its texts, whose encoding may be refused."""
    return sum(
        len(scorer.tokenizer(text, add_special_tokens=False).input_ids)
        for value in (item.prompt, completion)
        for text in _texts(value)
    )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value if isinstance(value, Sequence) else []
    found = [part.get("content") if isinstance(part, dict) else part for part in parts]
    return [text for text in found if isinstance(text, str)]


def _judged(
    scorer: RewardScorer, encoded: Iterator[tuple[_Trace, EncodedPair]], total: int, say: Say
) -> Iterator[JudgedTrace]:
    answer = _answer_reader(scorer.trained.task)
    for _ in _followed(range(0, total, _CHUNK), total, say):
        chunk = list(islice(encoded, _CHUNK))
        scored = scorer.score_encoded([pair for _, pair in chunk])
        for (trace, pair), one in zip(chunk, scored, strict=True):
            yield _judge(trace, pair, one, answer)


def _judge(trace: _Trace, pair: EncodedPair, scored: Scored, answer: AnswerReader) -> JudgedTrace:
    item, tokens = trace.item, scored.tokens
    scores, steps = {"f": scored.f}, {"f": [step.f for step in scored.steps]}
    if scored.reward is not None and tokens.logp is not None:
        scores["f - log pi"] = scored.reward
        steps["f - log pi"] = [known(step.reward) for step in scored.steps]
        ends = [0, *accumulate(pair.step_lengths)]
        sums = [math.fsum(tokens.logp[a:b]) for a, b in pairwise(ends)]
        scores["log pi (sum)"] = math.fsum(tokens.logp)
        scores["log pi (mean)"] = scores["log pi (sum)"] / len(tokens.logp)
        steps["log pi (sum)"] = sums
        steps["log pi (mean)"] = [
            total / length for total, length in zip(sums, pair.step_lengths, strict=True)
        ]
    if isinstance(item, Steps):
        return JudgedTrace(
            prompt=trace.prompt,
            correct=item.label == -1,
            answer=answer(scored.text),
            length=len(pair.completion),
            scores=scores,
            candidate=False,
            steps=steps,
            label=item.label,
        )
    answers = item.answers
    return JudgedTrace(
        prompt=trace.prompt,
        correct=item.correct[trace.index],
        answer=answer(scored.text) if answers is None else answers[trace.index],
        length=len(pair.completion),
        scores=scores,
    )


def _answer_reader(task: str) -> AnswerReader:
    """Read answers as the reward's task does, or in any form that is known."""

    def read(text: str) -> str | None:
        found = task_class(task).extract_answer(text) if task in TASKS else None
        return _answer(text) if found is None else found

    return read


def _answer(text: str) -> str | None:
    """The final answer in a form that can be compared: a letter, a number, or plain words."""
    letter = find_choice(text)
    if letter is not None:
        return letter
    found = find_answer(text)
    return None if found is None else canonical(found)


def _followed(starts: Sequence[int], total: int, say: Say) -> Iterator[int]:
    """Show progress on standard error: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(starts, description="scoring", console=console)
        return
    for start in starts:
        yield start
        done = min(start + _CHUNK, total)
        if done == total or done % (16 * _CHUNK) == 0:
            say(f"{done} of {total} traces scored")


def _listed(dropped: Counter[str]) -> str:
    return "".join(f"; left out: {count} {reason}" for reason, count in dropped.items())


def _finite(value: Any) -> Any:
    """The same tree with None where a number is not defined: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
