"""What the load test of the server serves and asks, and how its results are written down."""

from __future__ import annotations

import http.client
import json
import random
import re
from pathlib import Path
from typing import Any

TRAINING = {
    "granularity": "step",
    "interval": 8,
    "boundary": "[;\n]",
    "logit": "f-logp",
    "reward": "f",
    "temperature": 1.0,
    "task": "load",
}


def save_reward(folder: Path, model: str, head: str) -> str:
    """Write a reward over a model, with a head of random weights; return the end-of-text token.

    No policy is written: f alone is served, in one forward pass.
    """
    import torch

    from airl_fast import Discriminator, Policy

    policy = Policy.from_pretrained(model)
    options = {"kappa": 0.9, "offset": 0.1} if head == "lm" else {}
    discriminator = Discriminator.create(policy, head=head, **options)
    if head == "score":
        torch.manual_seed(0)
        torch.nn.init.normal_(discriminator.weight, std=discriminator.width**-0.5)
    discriminator.save(folder / "reward", training=TRAINING)
    return str(policy.tokenizer.eos_token)


def pairs(traces: Path | None, count: int) -> list[tuple[str, str]]:
    """Prompts and completions: of a file, or additions with forgotten carries."""
    if traces is not None:
        rows = [json.loads(line) for line in traces.read_text("utf-8").splitlines()[:count]]
        return [(f"{row['question']}\n", row["answer"]) for row in rows]
    from airl_fast.tasks.arithmetic import careless_trace, sample_problem

    rng = random.Random(0)
    problems = [sample_problem(rng) for _ in range(count)]
    return [(problem.prompt, careless_trace(problem, rng)) for problem in problems]


def batches(port: int) -> dict[str, float]:
    """What the server's own metrics say of its forward passes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()

    def value(name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    passes = value("airl_fast_batch_requests_count")
    return {
        "passes": passes,
        "requests_per_pass": round(value("airl_fast_batch_requests_sum") / max(passes, 1), 2),
        "tokens_scored": value("airl_fast_tokens_total"),
    }


def write(result: dict[str, Any], folder: Path | None) -> None:
    """Print a result and add it to a folder's results.json and results.md."""
    from benchmarks.environment import describe

    row = {**result, "environment": describe()}
    print(json.dumps(result, indent=2))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
    rows.append(row)
    path.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    (folder / "results.md").write_text(_markdown(rows), "utf-8")


_COLUMNS = {
    "model": "model",
    "head": "head",
    "clients": "clients",
    "seconds": "seconds",
    "requests": "requests",
    "lost": "lost",
    "mixed_up": "mixed up",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "requests_per_second": "requests/s",
    "completion_tokens_per_second": "completion tokens/s",
    "requests_per_pass": "requests a pass",
}


def _markdown(rows: list[dict[str, Any]]) -> str:
    environment = rows[-1]["environment"]
    lines = [
        "# `airl-fast serve` under load",
        "",
        f"{environment['hardware']}, {environment['cores']} cores shared by server and clients, "
        f"{environment['date'][:10]}. Made by `python -m benchmarks.serving`; a request asks for "
        "one to four completions, and every answer is checked against this process's scores.",
        "",
        "| " + " | ".join(_COLUMNS.values()) + " |",
        "|" + " --- |" * len(_COLUMNS),
    ]
    for row in rows:
        shown = {**row, "model": Path(str(row["model"])).name}
        lines.append("| " + " | ".join(str(shown[key]) for key in _COLUMNS) + " |")
    return "\n".join(lines) + "\n"
