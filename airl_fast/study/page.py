"""A study as results.json, results.md, report.html, and a page with plots for the documentation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from airl_fast.durable import make_folder, write_text
from airl_fast.report import Cell, Chart, Section, Series, Table, save_chart, write_report
from airl_fast.study.costs import in_words
from airl_fast.study.results import (
    READINGS,
    Difference,
    Row,
    Spread,
    StudyResults,
    as_json,
    difference,
    spread,
)
from airl_fast.study.spec import Study, folder_name

_ABOUT = (
    "± is the standard deviation over seeds; in brackets, 95% bootstrap intervals that resample "
    "the seeds and then their test problems. SFT checkpoints and temperatures were chosen on "
    "validation problems; test problems are only reported."
)
_LABELS = {
    "valid/pass@1": "pass@1 (validation, T = 1)",
    "valid/kl": "KL from the start (nats)",
    "valid/f": "f of the samples",
    "valid/auc_f": "AUC of f",
}


def write_page(
    folder: Path,
    name: str,
    about: str,
    study: Study,
    results: StudyResults,
    failed: Mapping[str, str],
    page: Path | None,
) -> None:
    """Write what was found, and print it.

    Args:
        folder: of the study: results.json, results.md and report.html.
        name: of the study.
        about: the comment at the top of its file.
        study: what was run.
        results: what it found.
        failed: cells that failed, and why.
        page: a Markdown file for the documentation, its plots as PNG in a folder beside it.
    """
    tables, charts = _tables(study, results), _charts(study, results)
    write_text(folder / "results.json", json.dumps(as_json(results), indent=1) + "\n")
    head = _head(name, about, study, results, failed)
    text = "\n".join([*head, *(_markdown(table) for table in tables)])
    write_text(folder / "results.md", text)
    write_report(
        folder / "report.html",
        f"airl_fast study: {name}",
        [
            Section(title="Results", items=tables),
            *([Section(title="Curves", items=charts)] if charts else []),
        ],
        conclusions=[_sentence(one) for one in results.differences],
        facts={"study": about, "seeds": ", ".join(map(str, study.seeds))},
    )
    print("\n".join(_markdown(table) for table in tables))
    print(f"Written to {folder}: results.json, results.md, report.html.")
    if page is not None:
        make_folder(page.parent)
        write_text(page, text + _plots(page, charts))
        print(f"Written: {page}")


def _head(
    name: str, about: str, study: Study, results: StudyResults, failed: Mapping[str, str]
) -> list[str]:
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"# Study: {name}",
        "",
        about,
        "",
        f"`airl-fast study {name}`: seeds {seeds}; its cells took {in_words(results.seconds)} "
        f"in all, one thread each, torch {torch.__version__}. {_ABOUT}",
        "",
    ]
    if failed:
        lines += ["Cells that failed, and are missing below:", ""]
        lines += [f"- {cell}: {why.splitlines()[0]}" for cell, why in failed.items()] + [""]
    if results.differences:
        lines += [f"- {_sentence(one)}" for one in results.differences] + [""]
    return lines


def _sentence(one: Difference) -> str:
    found, seeds = one.found, ", ".join(f"{100 * d:+.1f}" for d in one.by_seed.values())
    return (
        f"{one.first} {one.verdict} {'from ' if one.verdict == 'not told apart' else ''}"
        f"{one.second}, {one.reading}: {_points(found.difference)} points "
        f"[{_points(found.low)}, {_points(found.high)}] (by seed {seeds})"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _tables(study: Study, results: StudyResults) -> list[Table]:
    rows = [row for row in results.rows if row.readings]
    rewards = [row for row in results.rows if row.rerank]
    tables = [
        Table(
            title="Accuracy on test problems",
            columns=("policy", *READINGS.values(), "best T", "validation, at its best T"),
            rows=[_accuracy(row) for row in rows],
        ),
    ]
    if rewards:
        count = study.rerank_samples
        tables += [
            Table(
                title=f"Picking one of {count} samples of the policy at the start",
                columns=(
                    "reward",
                    "random",
                    "majority",
                    "log pi",
                    "f",
                    "oracle",
                    "gap closed",
                    "f less majority",
                    "f less log pi",
                ),
                rows=[_reranking(row) for row in rewards],
                note="Gap closed: (f - random) / (oracle - random). log pi is that of the policy.",
            ),
            Table(
                title="First wrong step, and right against wrong samples",
                columns=(
                    "reward",
                    "chance",
                    "log pi",
                    "f",
                    "f less log pi",
                    "AUC of log pi",
                    "AUC of f",
                ),
                rows=[_locating(row) for row in rewards],
                note="One digit of one step of a right trace is wrong and carried through; found "
                "where the lowest-scoring step is that one.",
            ),
        ]
    return tables


def _accuracy(row: Row) -> list[Cell]:
    temperatures = ", ".join(f"{t:g}" for t in dict.fromkeys(row.temperature.values()))
    readings = [str(spread(row.readings[reading])) for reading in READINGS]
    return [row.name, *readings, temperatures, str(Spread.of(list(row.validation.values())))]


def _reranking(row: Row) -> list[Cell]:
    at = {way: spread(values) for way, values in row.rerank.items()}
    room = at["oracle"].mean - at["random pick"].mean
    closed = f"{(at['f'].mean - at['random pick'].mean) / room:.2f}" if room else ""
    ways = ("random pick", "majority vote", "log pi", "f", "oracle")
    less = [_less(row.rerank, "f", other) for other in ("majority vote", "log pi")]
    return [row.name, *(str(at[way]) for way in ways), closed, *less]


def _locating(row: Row) -> list[Cell]:
    at = {way: str(spread(values)) for way, values in row.locate.items()}
    chance = f"{Spread.of(list(row.chance.values())).mean:.3f}"
    aucs = [
        str(Spread.of(list(row.auc[way].values()))) if way in row.auc else ""
        for way in ("log pi", "f")
    ]
    return [row.name, chance, at["log pi"], at["f"], _less(row.locate, "f", "log pi"), *aucs]


def _less(ways: Mapping[str, dict[int, list[float]]], first: str, second: str) -> str:
    made = difference(first, second, "", ways[first], ways[second])
    assert made is not None
    found = made.found
    return f"{_points(found.difference)} [{_points(found.low)}, {_points(found.high)}]"


def _charts(study: Study, results: StudyResults) -> list[Chart]:
    """Against policy steps, and accuracy against KL; of the seeds' mean, with their range.

    None of what was measured at the start and the end alone: that is in the tables.
    """
    rows = {row.name: row for row in results.rows if row.curves}
    plots = study.plots or {"All": tuple(study.variants)[:6]}
    charts = []
    for title, names in plots.items():
        shown = [rows[name] for name in names if name in rows]
        for key, label in _LABELS.items():
            series = [_against_steps(row, key) for row in shown if key in row.curves]
            if any(len(one.x) > 2 for one in series):
                charts.append(
                    Chart(
                        title=f"{title}: {label}",
                        x_label="policy step",
                        y_label=label,
                        series=series,
                    )
                )
        series = [made for row in shown if (made := _against_kl(row)) is not None]
        if series:
            label = _LABELS["valid/pass@1"]
            chart = Chart(
                title=f"{title}: pass@1 against KL",
                x_label=_LABELS["valid/kl"],
                y_label=label,
                series=series,
            )
            charts.append(chart)
    return charts


def _against_steps(row: Row, key: str) -> Series:
    steps, middle, low, high = zip(*row.curves[key], strict=True)
    return Series(name=row.name, x=steps, y=middle, low=low, high=high)


def _against_kl(row: Row) -> Series | None:
    kl = {step: value for step, value, *_ in row.curves.get("valid/kl", ())}
    points = [
        (kl[step], value)
        for step, value, *_ in row.curves["valid/pass@1"]
        if step in kl and step >= 0
    ]
    if len(points) < 3:
        return None
    x, y = zip(*points, strict=True)
    return Series(name=row.name, x=x, y=y)


def _markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", f"| {' | '.join(table.columns)} |"]
    lines.append("|" + " --- |" * len(table.columns))
    lines += [f"| {' | '.join(map(str, row))} |" for row in table.rows]
    return "\n".join([*lines, "", *([table.note, ""] if table.note else [])])


def _plots(page: Path, charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    folder = page.parent / page.stem
    lines = ["\n## Curves", "", "Means over the seeds; bands from the lowest to the highest.", ""]
    make_folder(folder)
    for chart in charts:
        file = folder / f"{folder_name(chart.title)}.png"
        save_chart(file, chart)
        lines += [f"![{chart.title}]({folder.name}/{file.name})", ""]
    return "\n".join(lines)
