"""Large sizes: do they work, in what time, and in what memory? `python -m benchmarks.large`.

Every part runs in a process of its own, whose peak resident set is reported, and is checked against
values computed independently. Times are of one call.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import airl_fast
from airl_fast.advantages import token_advantages
from airl_fast.batches import Shuffled
from airl_fast.packing import Trace, pack
from airl_fast.planning import plan_traces
from airl_fast.spans import span_rule
from airl_fast.tasks import jsonl
from airl_fast.tasks.jsonl import JSONLines
from airl_fast.tasks.rows import RowFile
from benchmarks.environment import describe, load, slug

Result = TypeVar("Result")
Rows = list[dict[str, Any]]
_MIB = 2**20


def memory(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) / 1024 if found else float("nan")


class Clock:
    """Times calls; a row for each."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def __call__(self, what: str, call: Callable[[], Result]) -> Result:
        if os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start, cpu = time.perf_counter(), time.process_time()
        result = call()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        own = memory("RssAnon")
        self.rows.append(
            {
                "what": what,
                "seconds": seconds,
                "cpu_seconds": cpu,
                "peak_mib": memory("VmHWM"),
                "own_mib": own,
            }
        )
        print(f"{what:48s} {seconds:8.2f} s {cpu:8.2f} s", file=sys.stderr, flush=True)
        return result


def batch(size: float) -> Rows:
    """A packed batch of 1,000,000 tokens in 20,000 sequences, eight to a prompt."""
    clock, rng, count = Clock(), np.random.default_rng(0), int(20_000 * size) // 8 * 8
    prompts = [tuple(rng.integers(0, 49_152, n).tolist()) for n in rng.integers(20, 60, count // 8)]
    found = [tuple(rng.integers(0, 49_152, n).tolist()) for n in rng.integers(10, 81, count)]
    rules = {name: span_rule(name) for name in ("dense", "sparse", "interval")}
    rules["step"] = span_rule("step", boundary_ids=list(range(0, 49_152, 9)))
    for name, rule in rules.items():
        lengths = clock(f"spans, {name}", lambda rule=rule: [rule(ids) for ids in found])
    traces = [
        Trace(prompt=prompts[i // 8], completion=ids, span_lengths=spans, group=i // 8)
        for i, (ids, spans) in enumerate(zip(found, lengths, strict=True))
    ]
    for ranks in (1, 64):
        plan = clock(
            f"plan_traces, ranks={ranks}", lambda r=ranks: plan_traces(traces, 16_384, ranks=r)
        )
        assert sorted(i for members in plan for i in members) == list(range(count))
    few = [Trace(prompt=(1,) * 40, completion=ids, span_lengths=(len(ids),)) for ids in found]
    clock("plan_traces, one prompt, ranks=64", lambda: plan_traces(few, 16_384, ranks=64))
    packed = clock("pack", lambda: pack(traces))
    assert clock("unpack", packed.unpack) == traces
    clock.rows.append({"what": f"{packed.num_tokens} tokens, {packed.num_actions} actions, "
                       f"{packed.num_spans} spans"})  # fmt: skip

    cu, seq = packed.cu_spans, packed.cu_seq_spans
    x = torch.randn(packed.num_actions)
    sums = np.add.reduceat(x.double().numpy(), cu[:-1].numpy())
    sizes = cu.diff().numpy()
    close(clock("segment_sum", lambda: airl_fast.segment_sum(x, cu)), sums)
    close(clock("segment_mean", lambda: airl_fast.segment_mean(x, cu)), sums / sizes)
    close(clock("segment_last", lambda: airl_fast.segment_last(x, cu)), x.numpy()[cu[1:] - 1])
    powers = np.exp(x.double().numpy())
    shares = powers / np.repeat(np.add.reduceat(powers, cu[:-1].numpy()), sizes)
    close(clock("segment_softmax", lambda: airl_fast.segment_softmax(x, cu)), shares)

    rewards = torch.randn(packed.num_spans)
    returns, cuts = rewards.double().numpy().copy(), seq.tolist()
    for start, stop in pairwise(cuts):
        for i in range(stop - 2, start - 1, -1):
            returns[i] += 0.99 * returns[i + 1]
    close(
        clock("discounted_returns", lambda: airl_fast.discounted_returns(rewards, seq, 0.99)),
        returns,
    )
    first = returns[seq[:-1].numpy()].reshape(-1, 8)
    mean, std = (np.repeat(a, 8) for a in (first.mean(1), first.std(1)))
    whole = torch.from_numpy(first.ravel()).float()
    expected = (first.ravel() - mean) / (std + 1e-6)
    close(
        clock("group_advantages", lambda: airl_fast.group_advantages(whole, packed.group)),
        expected,
        1e-3,
    )
    spans = seq.diff().numpy()
    expected = (returns - np.repeat(mean, spans)) / (np.repeat(std, spans) + 1e-6)
    options = {"cu_spans": cu, "cu_seq_spans": seq, "group": packed.group, "gamma": 0.99}
    got = clock("token_advantages", lambda: token_advantages(rewards, **options))
    close(got, np.repeat(expected, sizes), 1e-3)
    clock("token_advantages, by span", lambda: token_advantages(rewards, **options, level="span"))
    return clock.rows


def head(size: float) -> Rows:
    """More than 2^31 logits: every kernel's row and column offsets beyond 32 bits."""
    clock, n, vocab, width = Clock(), int(70_016 * size), 32_768, 8
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).requires_grad_()
    targets = torch.randint(0, vocab, (n,), generator=g)
    clock.rows.append({"what": f"N x V = {n} x {vocab} = {n * vocab:.3e}, 2^31 = {2**31:.3e}"})
    rows = torch.cat(
        [torch.arange(4), torch.randint(0, n, (56,), generator=g), torch.arange(n - 4, n)]
    )
    exact = hidden.detach()[rows].double().requires_grad_()
    log_p = (exact @ weight.detach().double().T).log_softmax(-1)
    taken = log_p.gather(1, targets[rows, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)

    with torch.no_grad():
        got = clock("linear_logprob, no gradient", lambda: airl_fast.linear_logprob(
            hidden, weight, targets, return_entropy=True))  # fmt: skip
    close(got[0][rows], taken), close(got[1][rows], entropy)

    def gradients() -> tuple[Tensor, ...]:
        logp, ent = airl_fast.linear_logprob(hidden, weight, targets, return_entropy=True)
        return torch.autograd.grad(logp.sum() + 0.5 * ent.sum(), (hidden, weight))

    d_hidden, d_weight = clock("linear_logprob and both gradients", gradients)
    (expected,) = torch.autograd.grad(taken.sum() + 0.5 * entropy.sum(), exact, retain_graph=True)
    close(d_hidden[rows], expected, 1e-4)
    # The gradient at a row of the weight needs all N rows: two of them, in float64, in pieces.
    columns = torch.tensor([3, vocab - 1])
    close(
        d_weight[columns], by_columns(hidden.detach(), weight.detach(), targets, columns, 0.5), 1e-4
    )

    advantages = torch.randn(n, generator=g)
    cu = torch.tensor([0, n // 2, n], dtype=torch.int32)

    def loss(needs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value, _ = airl_fast.linear_policy_loss(hidden, weight, targets, advantages, cu_seqs=cu)
        return value.detach(), *torch.autograd.grad(value, needs)

    # Without old_logp every ratio is 1: the loss is -mean(A), its gradient -A / N at logp.
    value, d_hidden, _ = clock("linear_policy_loss", lambda: loss((hidden, weight)))
    close(value, -advantages.double().mean(), 1e-5)
    (expected,) = torch.autograd.grad((taken * -advantages[rows] / n).sum(), exact)
    close(d_hidden[rows] * n, expected * n, 1e-4)
    weight.requires_grad_(False)
    _, d_hidden = clock("linear_policy_loss, frozen head", lambda: loss((hidden,)))
    close(d_hidden[rows] * n, expected * n, 1e-4)
    return clock.rows


def by_columns(
    hidden: Tensor, weight: Tensor, targets: Tensor, columns: Tensor, coef: float
) -> Tensor:
    """Rows ``columns`` of the gradient of sum(logp) + coef sum(entropy) at the weight, float64."""
    total = torch.zeros(len(columns), weight.shape[1], dtype=torch.float64)
    for x, target in zip(hidden.split(1024), targets.split(1024), strict=True):
        log_p = (x.double() @ weight.double().T).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1, keepdim=True)
        g = -p[:, columns] * (1 + coef * (log_p[:, columns] + entropy))
        g += (target[:, None] == columns).double()
        total += g.T @ x.double()
    return total


def data(size: float) -> Rows:
    """Ten million rows of JSON lines on disk."""
    clock, count = Clock(), int(10_000_000 * size)
    jsonl.STREAMED_BYTES = 1  # small sizes too
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        clock("writing the file", lambda: write(path, count))
        size_mib = path.stat().st_size / _MIB
        clock.rows.append({"what": f"{count} rows, {size_mib:.0f} MiB"})

        def open_task() -> JSONLines:
            return JSONLines(str(path), validation=200, test=400)

        task = clock("index built, sets drawn", open_task)
        task = clock("index there, sets drawn", open_task)
        index = path.with_name("train.jsonl.index").stat().st_size / _MIB
        clock.rows.append({"what": f"index: {index:.0f} MiB"})
        assert len(task.train) == count - 600
        shuffled = Shuffled(task.train, 0, "demonstrated")
        clock("an epoch's order, first row", lambda: shuffled.take(0, 1))
        few = min(10_000, count // 2)
        drawn = clock(f"{few} rows in that order", lambda: shuffled.take(1, few))
        assert len({e.id for e in drawn}) == few
        for example in drawn[::100]:
            i = int(example.id.rsplit("-", 1)[1])
            assert (example.prompt, example.completion) == (f"{i}+1=", f"{i}+1={i + 1}")
        clock("one pass of scoring's reader", lambda: sum(1 for _ in RowFile(path)))
    return clock.rows


def write(path: Path, count: int) -> None:
    """Small rows: a sum, and its result."""
    with path.open("w") as file:
        for start in range(0, count, 100_000):
            file.write("".join(
                f'{{"prompt": "{i}+1=", "completion": "{i}+1={i + 1}", "answer": "{i + 1}"}}\n'
                for i in range(start, min(count, start + 100_000))
            ))  # fmt: skip


def close(got: Tensor, expected: Any, tolerance: float = 2e-5) -> None:
    """Raise unless all values agree."""
    expected = torch.as_tensor(expected).detach().double()
    torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)


PARTS = {"batch": batch, "head": head, "data": data}


def markdown(results: dict[str, Any]) -> str:
    """The page of a run."""
    environment = results["environment"]
    lines = [
        "# Large sizes",
        "",
        f"{environment['hardware']}, {environment['threads']} thread(s), torch "
        f"{environment['versions']['torch']}, "
        f"load {results['load']}; `python -m benchmarks.large`.",
        "Seconds: of the clock, and of the processor (a busy machine stretches the first). Peak:",
        "the largest resident set of the process during the call, mapped files included. Own: what",
        "is no mapped file, after it. Every result was checked (see benchmarks/large.py).",
    ]
    for part, rows in results["parts"].items():
        doc = str(PARTS[part].__doc__)
        lines += [
            "",
            f"## {doc}",
            "",
            "| | seconds | of the processor | peak MiB | own MiB |",
            "|-|-:|-:|-:|-:|",
        ]
        for row in rows:
            numbers = ["", "", "", ""]
            if "seconds" in row:
                numbers = [f"{row[key]:.2f}" for key in ("seconds", "cpu_seconds")]
                numbers += [f"{row[key]:.0f}" for key in ("peak_mib", "own_mib")]
            lines.append(f"| {row['what']} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts, each in a process, and write results/HARDWARE-DATE/large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument("--size", type=float, default=1.0, help="of everything; 1: as in the title")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder; default: results/HARDWARE-DATE/large")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part:
        print(json.dumps(PARTS[options.part](options.size)))
        return
    environment = describe()
    root = Path(__file__).parent / "results" / slug(environment)
    folder = options.output or root / "large"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment, "load": load(), "parts": {}}
    earlier = folder / "results.json"
    if options.only and earlier.is_file():  # the other parts stay
        results["parts"] = json.loads(earlier.read_text())["parts"]
    for part in options.only or PARTS:
        command = [sys.executable, "-m", "benchmarks.large", "--part", part]
        command += ["--size", str(options.size), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results["parts"][part] = json.loads(done.stdout)
        earlier.write_text(json.dumps(results, indent=1) + "\n")
        (folder / "results.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
