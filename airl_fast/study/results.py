"""What a study found, over its seeds: means, standard deviations, paired differences, curves.

Settings (SFT checkpoint, temperature, and with ``checkpoint: best`` the step) were chosen on
validation problems, before; nothing here chooses anything by the test problems.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

from airl_fast.evaluation import PairedDifference, paired_bootstrap_of_runs
from airl_fast.study.cells import BASE, RESULT, SAMPLED_SFT, SFT, Cell, cell_config
from airl_fast.study.spec import BEST_SFT, Study

READINGS = {"sampled": "T = 1", "greedy": "greedy", "best": "at its best T"}
PerProblem = dict[int, list[float]]  # by seed
Curve = list[tuple[int, float, float, float]]  # step, mean over seeds, lowest, highest


@dataclass(frozen=True)
class Spread:
    """The mean over seeds, and their standard deviation (0 for one seed)."""

    mean: float
    std: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        """As 0.663 ± 0.021."""
        return f"{self.mean:.3f} ± {self.std:.3f}" if self.seeds > 1 else f"{self.mean:.3f}"


@dataclass
class Row:
    """One policy or variant.

    Attributes:
        name: as in the tables.
        start: of which start.
        readings: by reading (``READINGS``) and seed, the accuracy on every test problem.
        temperature: by seed, the best on validation problems.
        validation: by seed, the accuracy there at the best temperature.
        rerank: by way to pick and seed, per test problem; empty without a reward.
        locate: by way to find and seed, per planted error.
        chance: by seed, of finding it.
        auc: by score and seed.
        curves: by metric, over the seeds.
    """

    name: str
    start: str
    readings: dict[str, PerProblem] = field(default_factory=dict)
    temperature: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    rerank: dict[str, PerProblem] = field(default_factory=dict)
    locate: dict[str, PerProblem] = field(default_factory=dict)
    chance: dict[int, float] = field(default_factory=dict)
    auc: dict[str, dict[int, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)

    def add(self, seed: int, measured: Mapping[str, Any]) -> None:
        """Take what ``measuring.Measured`` holds, as JSON."""
        for reading in READINGS:
            self.readings.setdefault(reading, {})[seed] = measured[reading]
        self.temperature[seed] = measured["temperature"]
        self.validation[seed] = max(measured["validation"].values())

    def add_uses(self, seed: int, uses: Mapping[str, Any]) -> None:
        """Take what ``reward_uses.Uses`` holds, as JSON."""
        for name in ("rerank", "locate", "auc"):
            for way, values in uses[name].items():
                getattr(self, name).setdefault(way, {})[seed] = values
        self.chance[seed] = uses["chance"]


@dataclass(frozen=True)
class Difference:
    """One comparison, by one reading, in shares (0.05 is five points)."""

    first: str
    second: str
    reading: str
    found: PairedDifference
    by_seed: dict[int, float]

    @property
    def verdict(self) -> str:
        """Whether zero is outside the interval."""
        if self.found.low > 0:
            return "above"
        return "below" if self.found.high < 0 else "not told apart"


@dataclass(frozen=True)
class StudyResults:
    """Everything that the page is made from."""

    rows: list[Row]
    differences: list[Difference]
    seconds: float  # of all cells, added up


def collect(study: Study, cells: Sequence[Cell]) -> StudyResults:
    """Put the results of the cells that are done together."""
    rows: dict[tuple[str, str], Row] = {}
    curves: dict[str, list[dict[str, list[tuple[int, float]]]]] = {}
    seconds = 0.0
    several = len(study.starts) > 1
    for cell in cells:
        if not cell.done:
            continue
        result = cell.result()
        seconds += result["seconds"]
        if cell.kind == "start":
            _add_start(rows, cell, result, several)
        elif cell.kind == "variant":
            start = study.start_of(study.variants[cell.name])
            row = rows.setdefault(("variant", cell.name), Row(cell.name, start))
            row.add(cell.seed, result["measured"])
            if "rerank" in result:
                row.add_uses(cell.seed, result)
            curves.setdefault(cell.name, []).append(_from_the_start(study, cell, result["curves"]))
    for name, found in curves.items():
        rows["variant", name].curves = _over_seeds(found)
    order = {name: i for i, name in enumerate(study.variants)}
    listed = sorted(rows.items(), key=lambda item: order.get(item[0][1], -1))
    made = [row for _, row in listed]
    return StudyResults(made, _differences(study, rows), seconds)


def _from_the_start(
    study: Study, cell: Cell, curves: dict[str, list[tuple[int, float]]]
) -> dict[str, list[tuple[int, float]]]:
    """Curves with a point before the first step: a run that trains no reward begins later.

    The accuracy there was measured with the start, at temperature 1.
    """
    points = curves.get("valid/pass@1")
    if not points or points[0][0] <= 0 or cell_config(study, cell).sampling.temperature != 1:
        return curves
    methods = json.loads((cell.needs[0] / RESULT).read_text("utf-8"))["methods"]
    model = {"greedy": SFT, "sampled": SAMPLED_SFT, "base": BASE}[study.variants[cell.name].init]
    before = {"valid/pass@1": methods[model]["validation"]["1"], "valid/kl": 0.0}
    return curves | {key: [(0, before[key]), *curves[key]] for key in before if key in curves}


def _add_start(
    rows: dict[tuple[str, str], Row], cell: Cell, result: Mapping[str, Any], several: bool
) -> None:
    """The base and the SFTs; the best SFT of this seed is chosen on validation problems."""
    methods = dict(result["methods"])
    best = max((SFT, SAMPLED_SFT), key=lambda n: max(methods[n]["validation"].values()))
    methods[BEST_SFT] = methods[best]
    for name, measured in methods.items():
        shown = f"{name} ({cell.name})" if several else name
        row = rows.setdefault((cell.name, name), Row(shown, cell.name))
        row.add(cell.seed, measured)


def _differences(study: Study, rows: Mapping[tuple[str, str], Row]) -> list[Difference]:
    found = []
    for first, second in study.comparisons:
        a = rows.get(("variant", first))
        start = study.start_of(study.variants[first]) if first in study.variants else ""
        b = rows.get(("variant", second)) or rows.get((start, second))
        if a is None or b is None:
            continue  # it failed, and the page says so
        for reading, title in READINGS.items():
            made = difference(a.name, b.name, title, a.readings[reading], b.readings[reading])
            if made is not None:
                found.append(made)
    return found


def difference(
    first: str, second: str, reading: str, a: PerProblem, b: PerProblem
) -> Difference | None:
    """Over the seeds that both have; None where there is none."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    test = paired_bootstrap_of_runs([a[s] for s in seeds], [b[s] for s in seeds], seed=0)
    by_seed = {s: mean(a[s]) - mean(b[s]) for s in seeds}
    return Difference(first, second, reading, test, by_seed)


def spread(values: PerProblem) -> Spread:
    """Of the means of every seed."""
    return Spread.of([mean(per_problem) for per_problem in values.values()])


def _over_seeds(runs: Sequence[Mapping[str, list[tuple[int, float]]]]) -> dict[str, Curve]:
    """At every step that all seeds have."""
    curves: dict[str, Curve] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        having = [dict(run[key]) for run in runs if key in run]
        steps = sorted(set.intersection(*(set(points) for points in having)))
        at = [(step, [points[step] for points in having]) for step in steps]
        curves[key] = [(step, mean(values), min(values), max(values)) for step, values in at]
    return curves


def as_json(results: StudyResults) -> dict[str, Any]:
    """Everything but what the cells' own results keep: per-problem values as their means."""
    rows = []
    for row in results.rows:
        made = asdict(row)
        for name in ("readings", "rerank", "locate"):
            made[name] = {
                way: {seed: mean(values) for seed, values in seeds.items()}
                for way, seeds in made[name].items()
            }
        rows.append(made)
    return {
        "rows": rows,
        "differences": [asdict(one) for one in results.differences],
        "seconds": results.seconds,
    }
