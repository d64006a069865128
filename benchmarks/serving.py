"""Load on ``airl-fast serve``, every answer checked: ``python -m benchmarks.serving``.

Clients are threads, each with one connection kept alive, that send one request after the other
over loopback for a stated time. A request asks for one to four completions through one of the
protocols. The expected values are scored in this process beforehand, one completion at a time.

- lost: no answer, or one that is not 200.
- mixed up: an answer that is not what was asked for, beyond ``TOLERANCE``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOLERANCE = 2e-4  # relative and absolute, of float32 scores batched one way and another
_START_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt and a completion, and what this process scores it."""

    prompt: str
    completion: str
    f: float
    tokens: tuple[float, ...]
    ids: tuple[int, ...]  # of both, as /pooling is asked
    pooled: tuple[float, ...]  # 0 for the first of them
    chat_f: float | None  # as messages, where there is a chat template


@dataclass(kw_only=True)
class Tally:
    """What one client saw."""

    seconds: list[float] = field(default_factory=list)
    completions: int = 0
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    routes: Counter[str] = field(default_factory=Counter)


def expected(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[Case]:
    """Score pairs in this process, each in a pass of its own."""
    from airl_fast import RewardScorer

    scorer = RewardScorer.from_pretrained(folder)
    cases = []
    for prompt, completion in pairs:
        pair = scorer.encode(prompt, completion)
        ids = pair.prompt + pair.completion
        (scored,) = scorer.score_encoded([pair])
        (pooled,) = scorer.score([ids[:1]], [ids[1:]])
        chat_f = None
        if scorer.tokenizer.chat_template is not None:
            (chat,) = scorer.score([_messages(prompt, completion)[:1]], [completion])
            chat_f = chat.f
        cases.append(
            Case(
                prompt=prompt,
                completion=completion,
                f=scored.f,
                tokens=scored.tokens.f,
                ids=tuple(ids),
                pooled=(0.0, *pooled.tokens.f),
                chat_f=chat_f,
            )
        )
    return cases


def _messages(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


@contextmanager
def served(folder: Path, *options: str, threads: int | None = None) -> Iterator[tuple[Any, int]]:
    """Run ``airl-fast serve`` on a free port; yields process and port, and always ends it."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "airl_fast", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(_START_SECONDS, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving on http://127.0.0.1:" not in line:
            raise RuntimeError(f"the server did not start: it said {line!r} and went")
        timer.cancel()
        yield process, int(line.rsplit(":", 1)[1])
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def load(
    port: int, cases: Sequence[Case], *, clients: int, seconds: float, end: str, seed: int = 0
) -> dict[str, Any]:
    """Ask from many clients at once and check every answer.

    Args:
        port: of a server on 127.0.0.1.
        cases: what is asked for.
        clients: threads.
        seconds: for how long new requests are sent.
        end: the end-of-text token, which OpenRLHF writes after a finished completion.
        seed: of what is asked.

    Returns:
        Counts, latencies in milliseconds and rates.
    """
    tallies = [Tally() for _ in range(clients)]
    start = time.monotonic()
    threads = [
        threading.Thread(
            target=_client,
            args=(tally, port, cases, start + seconds, end, random.Random(seed * 1000 + i)),
        )
        for i, tally in enumerate(tallies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    times = sorted(t for tally in tallies for t in tally.seconds)
    lost = [reason for tally in tallies for reason in tally.lost]
    mixed = [reason for tally in tallies for reason in tally.mixed_up]
    requests = len(times) + len(lost)
    return {
        "clients": clients,
        "seconds": round(took, 2),
        "requests": requests,
        "lost": len(lost),
        "mixed_up": len(mixed),
        "first_failures": [*lost[:3], *mixed[:3]],
        "by_route": dict(sum((tally.routes for tally in tallies), Counter())),
        "completions": sum(tally.completions for tally in tallies),
        "requests_per_second": round(requests / took, 1),
        "completion_tokens_per_second": round(sum(t.tokens for t in tallies) / took),
        "p50_ms": round(1000 * _quantile(times, 0.5), 1),
        "p99_ms": round(1000 * _quantile(times, 0.99), 1),
        "max_ms": round(1000 * times[-1], 1) if times else None,
    }


def _quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share q of all does not exceed; NaN of none."""
    if not values:
        return float("nan")
    return values[max(0, -int(-q * len(values) // 1) - 1)]


def _client(
    tally: Tally,
    port: int,
    cases: Sequence[Case],
    until: float,
    end: str,
    rng: random.Random,
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    paths = ["/score", "/get_reward", "/pooling"]
    if cases[0].chat_f is not None:
        paths.append("/classify")
    while time.monotonic() < until:
        path = rng.choice(paths)
        asked = rng.choices(cases, k=1 if path == "/classify" else rng.randint(1, 4))
        body = json.dumps(_request(path, asked, end))
        start = time.monotonic()
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            tally.lost.append(f"{path}: {error!r}")
            connection.close()
            continue
        took = time.monotonic() - start
        if response.status != 200:
            tally.lost.append(f"{path}: {response.status} {content[:200]!r}")
            continue
        tally.seconds.append(took)
        tally.routes[path] += 1
        tally.completions += len(asked)
        tally.tokens += sum(len(case.tokens) for case in asked)
        if wrong := _difference(path, asked, json.loads(content)):
            tally.mixed_up.append(wrong)
    connection.close()


def _request(path: str, asked: Sequence[Case], end: str) -> dict[str, Any]:
    prompts = [case.prompt for case in asked]
    if path == "/score":
        return {"prompts": prompts, "completions": [case.completion for case in asked]}
    if path == "/pooling":
        return {"input": [case.ids for case in asked], "use_activation": False}
    if path == "/classify":
        messages = _messages(asked[0].prompt, asked[0].completion)
        return {"messages": messages, "use_activation": False}
    query = [case.prompt + case.completion + end for case in asked]
    return {"query": query, "prompts": prompts, "labels": [""] * len(asked)}


def _difference(path: str, asked: Sequence[Case], answer: dict[str, Any]) -> str | None:
    """What of an answer is not as expected."""
    if path == "/get_reward":
        wanted = [case.f for case in asked]
        return _far(path, answer["rewards"], wanted)
    if path == "/pooling":
        pooled = [value for case in asked for value in case.pooled]
        return _far(path, [row[0] for one in answer["data"] for row in one["data"]], pooled)
    if path == "/classify":
        assert asked[0].chat_f is not None
        return _far(path, answer["data"][0]["probs"], [asked[0].chat_f])
    results = answer["results"]
    if [one["text"] for one in results] != [case.completion for case in asked]:
        return f"{path}: the texts of others"
    for one, case in zip(results, asked, strict=True):
        if far := _far(path, [one["f"], *one["tokens"]["f"]], [case.f, *case.tokens]):
            return far
    return None


def _far(path: str, found: Sequence[float], wanted: Sequence[float]) -> str | None:
    if len(found) != len(wanted):
        return f"{path}: {len(found)} values for {len(wanted)}"
    for a, b in zip(found, wanted, strict=True):
        if abs(a - b) > TOLERANCE * max(1.0, abs(b)):
            return f"{path}: received {a}, expected {b}"
    return None


def main() -> int:
    """Make a reward, serve it, put load on it, and write results.json and results.md."""
    from benchmarks import serving_cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S")
    parser.add_argument("--model", default="arithmetic-base", metavar="NAME|DIR")
    parser.add_argument("--head", choices=("lm", "score"), default="lm")
    parser.add_argument("--traces", type=Path, metavar="FILE.jsonl",
                        help="rows of question and answer; arithmetic by default")  # fmt: skip
    parser.add_argument("--cases", type=int, default=64, metavar="N", help="different pairs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="gets results.json and .md")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        end = serving_cases.save_reward(folder, arguments.model, arguments.head)
        pairs = serving_cases.pairs(arguments.traces, arguments.cases)
        cases = expected(folder, pairs)
        with served(folder) as (process, port):
            result = load(
                port, cases, clients=arguments.clients, seconds=arguments.seconds, end=end
            )
            counts = serving_cases.batches(port)
            process.send_signal(signal.SIGTERM)
            result["exit_status"] = process.wait(60)
    lengths = [len(case.tokens) for case in cases]
    about = {
        "model": Path(arguments.model).name,
        "head": arguments.head,
        "completion_tokens": sum(lengths) / len(lengths),
    }
    serving_cases.write({**about, **result, **counts}, arguments.output)
    return 1 if result["lost"] or result["mixed_up"] else 0


if __name__ == "__main__":
    sys.exit(main())
