"""The page: one file that asks for nothing else, and lets nothing in it ask."""

import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from itertools import count, groupby
from pathlib import Path

from airl_fast.report import svg
from airl_fast.report.content import Cell, Chart, Estimate, Section, Table
from airl_fast.report.text import escape
from airl_fast.report.traces import TraceSet
from airl_fast.report.viewer import summary_table, viewer


def write_report(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    conclusions: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the report: whole, or not at all.

    Args:
        path: the HTML file; its folder is made if it does not exist.
        title: of the page.
        sections: in reading order.
        conclusions: what holds and what does not, in plain words, shown first.
        facts: how the run was made (command, versions, machine), shown under the title.
    """
    path = Path(path)
    page = _page(title, sections, conclusions, facts or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _page(
    title: str, sections: Sequence[Section], conclusions: Sequence[str], facts: Mapping[str, str]
) -> str:
    sets = count(1)
    body = [f"<header><h1>{escape(title)}</h1>"]
    if facts:
        rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        body.append(f"<dl>{''.join(rows)}</dl>")
    if len(sections) > 1:
        links = (
            f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections)
        )
        body.append(f'<nav aria-label="Contents">{"".join(links)}</nav>')
    body.append("</header>\n<main>")
    if conclusions:
        lines = "".join(f"<li>{escape(text)}</li>" for text in conclusions)
        body.append(f'<section class="conclusions"><h2>Conclusions</h2><ul>{lines}</ul></section>')
    body.extend(_section(section, i, sets) for i, section in enumerate(sections))
    body.append("</main>")
    style, script = _asset("report.css"), _asset("viewer.js")
    scripts = f"<script>{script}</script>" if next(sets) > 1 else ""
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="referrer" content="no-referrer">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{style}</style></head>\n<body>{chr(10).join(body)}\n{scripts}</body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("airl_fast.report") / "assets" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """What a Content-Security-Policy allows exactly this inline element by."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _section(section: Section, number: int, sets: Iterator[int]) -> str:
    parts = [f'<h2 id="s{number}">{escape(section.title)}</h2>']
    parts.extend(f"<p>{escape(text)}</p>" for text in section.text)
    for is_chart, items in groupby(section.items, key=lambda item: isinstance(item, Chart)):
        shown = "".join(_item(item, sets) for item in items)
        parts.append(f'<div class="charts">{shown}</div>' if is_chart else shown)
    if section.pre:
        parts.append(_details("Show", f"<pre>{escape(section.pre)}</pre>"))
    return f'<section aria-labelledby="s{number}">{"".join(parts)}</section>'


def _item(item: Table | Chart | TraceSet, sets: Iterator[int]) -> str:
    after = ""
    match item:
        case Table():
            shown = _table(item)
        case Chart():
            shown = svg.legend(item) + svg.svg(item)
            after = _as_table(svg.numbers(item))
        case TraceSet():
            shown = viewer(item, next(sets))
            after = _as_table(summary_table(item))
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    caption = f"<figcaption><h3>{escape(item.title)}</h3></figcaption>"
    return f"<figure>{caption}{shown}{note}{after}</figure>"


def _as_table(table: Table) -> str:
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return _details(f"{table.title}: the numbers as a table", _table(table) + note)


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = []
    for row in table.rows:
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])
        rows.append(f'<tr><th scope="row">{_cell(row[0])}</th>{cells}</tr>')
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    name = escape(table.title)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>{content}'
        "</table></div>"
    )


def _cell(cell: Cell) -> str:
    match cell:
        case Estimate():
            interval = f"{cell.low:.3f} to {cell.high:.3f}"
            return f'{cell.value:.3f} <span class="interval">{interval}</span>'
        case float():
            return f"{cell:.3f}"
    return escape(str(cell))
