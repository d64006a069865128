"""Several runs of the demo as one Markdown table: mean and standard deviation over the seeds.

python docs/demo/table.py runs/demo-0 runs/demo-1 runs/demo-2
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from airl_fast.evaluation.numbers import paired_bootstrap_of_runs

_OTHERS = (  # what AIRL is compared with, in which column
    ("the best SFT, each at its best temperature", "SFT", "best"),
    ("the same reward frozen, T = 1", "AIRL, f frozen", "sampled"),
    ("GRPO with the true outcome, each at its best temperature", "GRPO, true outcome", "best"),
    ("the SFT's log pi as the reward, each at its best temperature",
     "SFT, then its log pi as the reward", "best"),
)  # fmt: skip


_PARTS = (range(3), range(3, 1000))  # settings were chosen on the first


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def difference(runs: list[dict[str, Any]], other: str, key: str) -> str:
    ours, theirs = ([run["methods"][name][key] for run in runs] for name in ("AIRL", other))
    found = paired_bootstrap_of_runs(ours, theirs, seed=0)
    return f"{100 * found.difference:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def main(folders: list[str]) -> None:
    if len(folders) < 2:
        sys.exit(f"{__doc__}\nexpected two or more folders, for a standard deviation")
    runs = [json.loads((Path(folder) / "metrics.json").read_text()) for folder in folders]
    print("| policy | pass@1, T = 1 | greedy | at its best T |\n| --- | --- | --- | --- |")
    for name in runs[0]["methods"]:
        having = [run["methods"][name] for run in runs if name in run["methods"]]
        columns = [cell([mean(m[key]) for m in having]) for key in ("sampled", "greedy", "best")]
        print(f"| {name} | {' | '.join(columns)} |")
    samples = runs[0]["settings"]["rerank_samples"]
    used = [run["uses"] for run in runs]
    print(f"\n| picking one of {samples} samples of the base by | accuracy |\n| --- | --- |")
    for way in used[0]["rerank"]:
        print(f"| {way} | {cell([mean(uses['rerank'][way]) for uses in used])} |")
    print("\n| lowest-scoring step is the planted error, by | accuracy |\n| --- | --- |")
    print(f"| chance | {mean([uses['chance'] for uses in used]):.3f} |")
    for way in used[0]["locate"]:
        print(f"| {way} | {cell([mean(uses['locate'][way]) for uses in used])} |")
    seeds = [run["settings"]["seed"] for run in runs]
    groups = [[r for r, s in zip(runs, seeds, strict=True) if s in part] for part in _PARTS]
    print("\n| AIRL less | seeds 0 to 2 | seeds 3 on | all |\n| --- | --- | --- | --- |")
    for label, other, key in _OTHERS:
        cells = [difference(group, other, key) for group in (*groups, runs) if group]
        print(f"| {label} | {' | '.join(cells)} |")
    alone = [difference([run], "SFT", "best").split()[0] for run in runs]
    print("\nAIRL less the best SFT by seed:", ", ".join(alone))
    print("Seeds:", ", ".join(map(str, seeds)))
    print("Seconds:", ", ".join(f"{run['seconds']:.0f}" for run in runs))


if __name__ == "__main__":
    main(sys.argv[1:])
