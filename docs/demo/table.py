"""Several runs of the demo as one Markdown table: mean and standard deviation over the seeds.

python docs/demo/table.py runs/demo-0 runs/demo-1 runs/demo-2
"""

import json
import statistics
import sys
from pathlib import Path


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


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
    print("\nSeeds:", ", ".join(str(run["settings"]["seed"]) for run in runs))
    print("Seconds:", ", ".join(f"{run['seconds']:.0f}" for run in runs))


if __name__ == "__main__":
    main(sys.argv[1:])
