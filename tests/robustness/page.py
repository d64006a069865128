"""Writes the tables of docs/robustness.md: ``python -m tests.robustness.page``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.robustness import (
    batches,
    commands,
    commands_runs,
    data,
    evaluating,
    integrations,
    models,
    operators_groups,
    operators_head,
    operators_score,
    operators_spans,
    scorer,
    serving,
    settings,
    spans,
)
from tests.robustness.table import FAULTS, Cell, Refused, Served

AREAS = {
    "Operators over the head": [*operators_head.CELLS, *operators_score.CELLS],
    "Operators over spans": operators_spans.CELLS,
    "Advantages": operators_groups.CELLS,
    "Traces and batches": batches.CELLS,
    "Spans": spans.CELLS,
    "Models and sampling": models.CELLS,
    "The scorer": scorer.CELLS,
    "Configurations and training": settings.CELLS,
    "Tasks and readers": data.CELLS,
    "Numbers of an evaluation": evaluating.CELLS,
    "Integrations": integrations.CELLS,
    "The server": serving.CELLS,
    "Commands": commands.CELLS + commands_runs.CELLS,
}
CELLS: list[Cell] = [cell for cells in AREAS.values() for cell in cells]
PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
_BEGIN, _END = "<!-- rows: written by tests/robustness/page.py -->", "<!-- end of rows -->"


def tables() -> str:
    """Every area's table, entry point by entry point, in the order of ``FAULTS``."""
    kinds = [type(cell) for cell in CELLS]
    lines = [
        f"{kinds.count(Refused)} calls that are refused, {kinds.count(Served)} that look like a "
        f"fault and are none, {len({cell.entry for cell in CELLS})} entry points.",
    ]
    for area, cells in AREAS.items():
        lines += ["", f"### {area}", "", "| entry point | fault | given | what comes of it |"]
        lines += ["| --- | --- | --- | --- |", *_rows(cells)]
    return "\n".join(lines)


def _rows(cells: list[Cell]) -> Iterator[str]:
    order = list(FAULTS)
    for entry in dict.fromkeys(cell.entry for cell in cells):
        senseless: dict[str, list[str]] = {}
        mine = [cell for cell in cells if cell.entry == entry]
        for cell in sorted(mine, key=lambda cell: order.index(cell.fault)):
            if isinstance(cell, Refused):
                message = f"{cell.error.__name__}: {_code(cell.received)}; {_code(cell.remedy)}"
                yield _line(_code(entry), cell.fault, cell.given, message)
            elif isinstance(cell, Served):
                yield _line(_code(entry), cell.fault, cell.given, f"no fault: {cell.result}")
            else:
                senseless.setdefault(cell.why, []).append(cell.fault)
        for why, faults in senseless.items():
            yield _line(_code(entry), ", ".join(faults), "", f"makes no sense: {why}")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def written(page: str) -> str:
    """The page with its tables as the rows have them."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}\n\n{tables()}\n\n{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
