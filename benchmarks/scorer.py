"""RewardScorer beside padded transformers on GSM8K traces: ``python -m benchmarks.scorer``.

One model gives f: with an ``lm`` head log q of every token of the completion, with a ``score`` head
one number at each. The peers are what one writes with transformers alone: a batch of rows padded on
the right, AutoModelForCausalLM and a log-sum-exp of its logits, or AutoModelForTokenClassification.
They run one trace at a time, in batches in the order given, and in batches of like length, each
with the batch size that was fastest here. Every variant's values are held to those of one trace at
a time before it is timed; the variants take turns.

Two workloads: one solution a question; and several of each, made of the solution by planting a
wrong number, so that their lengths are those of real ones.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from airl_fast import Discriminator, RewardScorer
from airl_fast.encoding import EncodedPair
from airl_fast.language_model import Origin
from airl_fast.loading import load_language_model
from airl_fast.reading import Passes
from airl_fast.scores import Trained
from airl_fast.tasks.answers import wrong_number
from airl_fast.tasks.rows import read_rows
from benchmarks.environment import describe

_TOLERANCE = 1e-4  # largest error over the largest magnitude
_BATCHES = 2, 4, 8
_HEADS = "lm", "score"
Values = list[Tensor]  # of each trace, f of its completion's tokens
Run = Callable[[], Values]
Peer = Callable[[Sequence[EncodedPair], int], Values]


@dataclass
class Timed:
    """One variant of a workload: its name, how to run it, and seconds of every round."""

    name: str
    run: Run
    seconds: list[float]
    error: float


def main() -> int:
    """Read the options, measure, write results.json and results.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scorer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name, such as SmolLM2-135M-Instruct")
    add("--data", type=Path, required=True, help="GSM8K as JSON lines: question, answer")
    add("--head", choices=_HEADS, action="append", help="one of them only; may be repeated")
    add("--questions", type=int, default=12, help="of one solution (default: %(default)s)")
    add("--group", type=int, default=6, help="solutions of a question (default: %(default)s)")
    add("--groups", type=int, default=2, help="questions of several (default: %(default)s)")
    add("--rounds", type=int, default=2, help="(default: %(default)s)")
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draw and the order (default: %(default)s)")
    add("--output", type=Path, help="folder of results.json and results.md; default: print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [
        workload
        for head in options.head or _HEADS
        for workload in measure(
            options.model,
            options.data,
            head,
            counts=((options.questions, 1), (options.groups, options.group)),
            rounds=options.rounds,
            seed=options.seed,
        )
    ]
    found = {"environment": describe(), "options": _plain(vars(options)), "workloads": results}
    text = markdown(found)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (options.output / "results.md").write_text(text + "\n", "utf-8")
    return int(any(row["error"] > _TOLERANCE for w in results for row in w["rows"]))


def measure(
    model: str,
    data: Path,
    head: str,
    *,
    counts: Sequence[tuple[int, int]],
    rounds: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Measure one head on workloads of (questions, solutions of each)."""
    scorers = {passes: _scorer(model, head, passes, seed) for passes in ("packed", "alone")}
    peer = _peer(model, head, scorers["packed"])
    found = []
    for questions, group in counts:
        pairs = _pairs(scorers["packed"], data, questions, group, seed)
        rows = _timed(_runs(scorers, peer, pairs), peer(pairs, 1), rounds, seed)
        found.append(
            {
                "head": head,
                "traces": len(pairs),
                "solutions_a_question": group,
                "prompt_tokens": statistics.mean(len(p.prompt) for p in pairs),
                "completion_tokens": statistics.mean(len(p.completion) for p in pairs),
                "rows": [_row(row, rows, len(pairs)) for row in rows],
            }
        )
    return found


def _runs(
    scorers: Mapping[str, RewardScorer], peer: Peer, pairs: Sequence[EncodedPair]
) -> dict[str, Run]:
    def ours(scorer: RewardScorer) -> Values:
        return [torch.tensor(one.tokens.f) for one in scorer.score_encoded(pairs)]

    runs: dict[str, Run] = {
        f"airl_fast, {passes}": partial(ours, scorer) for passes, scorer in scorers.items()
    }
    runs["transformers, one at a time"] = partial(peer, pairs, 1)
    by_length = sorted(range(len(pairs)), key=lambda i: _length(pairs[i]))
    for name, order in (("as given", list(range(len(pairs)))), ("by length", by_length)):
        size = _fastest(pairs, order, peer)
        label = f"transformers, padded {name}, batches of {size}"
        runs[label] = partial(_ordered, pairs, order, size, peer)
    return runs


def _timed(runs: dict[str, Run], expected: Values, rounds: int, seed: int) -> list[Timed]:
    """Check every variant once, its warm-up, then time them in turns."""
    rows = [Timed(name, run, [], _error(run(), expected)) for name, run in runs.items()]
    live = [row for row in rows if row.error <= _TOLERANCE]
    rng = random.Random(seed)
    for _ in range(rounds):
        for row in rng.sample(live, len(live)):
            start = time.perf_counter()
            row.run()
            row.seconds.append(time.perf_counter() - start)
    return rows


def _row(row: Timed, rows: Sequence[Timed], traces: int) -> dict[str, Any]:
    """A variant's seconds, traces a second, and time over that of each of ours, same round."""
    seconds = statistics.median(row.seconds) if row.seconds else None
    over = {
        ours.name.removeprefix("airl_fast, "): statistics.median(
            theirs / own for theirs, own in zip(row.seconds, ours.seconds, strict=True)
        )
        for ours in rows
        if ours.name.startswith("airl_fast") and row.seconds and ours.seconds
    }
    return {
        "variant": row.name,
        "seconds": seconds,
        "all_seconds": row.seconds,
        "traces_a_second": None if seconds is None else traces / seconds,
        "time_over": over,
        "error": row.error,
    }


def _scorer(model: str, head: str, passes: Passes, seed: int) -> RewardScorer:
    body = load_language_model(Origin(model=model))
    width = body.head.weight.shape[1]
    discriminator = Discriminator(body, head=head, trunk="own", width=width)  # type: ignore[arg-type]
    if head == "score":
        generator = torch.Generator().manual_seed(seed)
        discriminator.weight.data.normal_(generator=generator)
    trained = Trained(
        granularity="dense", interval=1, boundary="\n", logit="f-logp", reward="f",
        temperature=1.0, task="gsm8k",
    )  # fmt: skip
    return RewardScorer(discriminator, trained, passes=passes)


def _peer(model: str, head: str, scorer: RewardScorer) -> Peer:
    """Padded transformers with the scorer's weights: f of traces, in batches of a size."""
    if head == "lm":
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    else:
        network = AutoModelForTokenClassification.from_pretrained(
            model, dtype=torch.float32, num_labels=1
        )
        network.score.weight.data.copy_(scorer.discriminator.weight)
        network.score.bias.data.zero_()
    network.eval()

    @torch.no_grad()
    def run(pairs: Sequence[EncodedPair], size: int) -> Values:
        values = []
        for first in range(0, len(pairs), size):
            batch = pairs[first : first + size]
            ids = torch.zeros(len(batch), max(map(_length, batch)), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, pair in enumerate(batch):
                ids[row, : _length(pair)] = torch.tensor(pair.prompt + pair.completion)
                mask[row, : _length(pair)] = 1
            logits = network(input_ids=ids, attention_mask=mask).logits
            if head == "lm":
                taken = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
                found = taken - logits[:, :-1].logsumexp(2)
            else:
                found = logits[:, 1:, 0]
            values += [
                row[len(pair.prompt) - 1 : _length(pair) - 1]
                for row, pair in zip(found, batch, strict=True)
            ]
        return values

    return run


def _pairs(
    scorer: RewardScorer, data: Path, questions: int, group: int, seed: int
) -> list[EncodedPair]:
    rng = random.Random(seed)
    pairs = []
    for row in rng.sample(read_rows(data), questions):
        solution = row.text("answer", "give GSM8K's columns")
        texts = [solution] + [wrong_number(solution, "\n", rng)[0] for _ in range(group - 1)]
        prompt = [{"role": "user", "content": row.text("question", "give GSM8K's columns")}]
        pairs += [scorer.encode(prompt, text) for text in texts]
    return rng.sample(pairs, len(pairs))  # the order in which requests come is no order


def _fastest(pairs: Sequence[EncodedPair], order: Sequence[int], peer: Peer) -> int:
    """The batch size that takes the least time."""
    seconds = {}
    for size in (size for size in _BATCHES if size <= len(pairs)):
        start = time.perf_counter()
        _ordered(pairs, order, size, peer)
        seconds[size] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def _ordered(pairs: Sequence[EncodedPair], order: Sequence[int], size: int, peer: Peer) -> Values:
    found = dict(zip(order, peer([pairs[i] for i in order], size), strict=True))
    return [found[i] for i in range(len(pairs))]


def _error(found: Values, expected: Values) -> float:
    one, other = torch.cat(found).double(), torch.cat(expected).double()
    return float((one - other).abs().max() / other.abs().max())


def _length(pair: EncodedPair) -> int:
    return len(pair.prompt) + len(pair.completion)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options without where things are on this machine."""
    kept = {name: value for name, value in options.items() if name not in ("output", "data")}
    return {**kept, "model": Path(options["model"]).name}


def markdown(found: dict[str, Any]) -> str:
    """The results as tables."""
    env = found["environment"]
    lines = [
        "# RewardScorer beside padded transformers",
        "",
        f"- {env['date']}, {env['hardware']}, {env['cores']} cores, {env['threads']} threads, "
        f"{env['cpu_capability']}",
        "- " + ", ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "- options: " + ", ".join(f"{name} {value}" for name, value in found["options"].items()),
        "- seconds: median of the rounds; over: median of the time over ours, same round; error: "
        "largest over the largest magnitude, against transformers one at a time",
    ]
    for work in found["workloads"]:
        lines += [
            "",
            f"## head {work['head']}, {work['traces']} traces, "
            f"{work['solutions_a_question']} of each question",
            "",
            f"On average {work['prompt_tokens']:.0f} prompt tokens and "
            f"{work['completion_tokens']:.0f} of the completion.",
            "",
            "| variant | seconds | traces a second | over packed | over alone | error |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in work["rows"]:
            if row["seconds"] is None:
                lines.append(f"| {row['variant']} | wrong | | | | {row['error']:.0e} |")
                continue
            over = row["time_over"]
            lines.append(
                f"| {row['variant']} | {row['seconds']:.2f} | {row['traces_a_second']:.2f} | "
                f"{over['packed']:.2f} | {over['alone']:.2f} | {row['error']:.0e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
