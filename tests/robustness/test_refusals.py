"""Every row of the table: what was received and what to do stand in the message."""

import json

import pytest

import airl_fast
from airl_fast import evaluation, tasks
from airl_fast.serving import protocols
from tests.robustness import page
from tests.robustness.page import CELLS
from tests.robustness.table import FAULTS, Refused, Senseless, Served
from tests.robustness.things import things  # noqa: F401


def name(cell):
    return f"{cell.entry}-{cell.fault}-{cell.given}"


@pytest.mark.parametrize("cell", [c for c in CELLS if isinstance(c, Refused)], ids=name)
def test_it_is_refused_with_what_was_received_and_the_remedy(cell, things):  # noqa: F811
    with pytest.raises(cell.error) as raised:
        cell.call(things)
    assert not isinstance(raised.value, json.JSONDecodeError | UnicodeError), "not worded here"
    message = str(raised.value)
    assert cell.received in message, message
    assert cell.remedy in message, message


@pytest.mark.parametrize("cell", [c for c in CELLS if isinstance(c, Served)], ids=name)
def test_it_is_no_fault(cell, things):  # noqa: F811
    assert cell.call(things)


def test_every_entry_point_says_something_about_every_fault():
    by_entry = {}
    for cell in CELLS:
        by_entry.setdefault(cell.entry, {}).setdefault(cell.fault, []).append(cell)
    for entry, faults in by_entry.items():
        assert set(faults) == set(FAULTS), (entry, set(FAULTS) ^ set(faults))
        for cells in faults.values():
            assert len(cells) == 1 or not any(isinstance(c, Senseless) for c in cells), cells


RESULTS = {"PolicyLossStats", "AIRLScore", "DiscriminatorStats", "explain"}  # take no input
METHODS = {  # of the classes that are exported, what makes or uses them
    "Policy": ["Policy.from_pretrained"],
    "Discriminator": ["Discriminator.create", "Discriminator.from_pretrained"],
    "RewardScorer": [f"RewardScorer.{m}" for m in ("from_pretrained", "score", "rerank", "locate")],
}
TYPES = {"Array", "Localisation", "PairedDifference"}  # what evaluation returns


def test_every_public_entry_point_is_in_the_table():
    from airl_fast import cli

    wanted = []
    for exported in set(airl_fast._HOME) - RESULTS:
        wanted += METHODS.get(exported, [exported])
    wanted += [f"evaluation.{exported}" for exported in set(evaluation.__all__) - TYPES]
    wanted += [f"task {task}" for task in tasks.TASKS]
    wanted += [f"POST {path}" for path in protocols.ROUTES]
    (action,) = cli._parser()._subparsers._group_actions
    commands = list(action.choices)
    assert len(commands) > 8
    wanted += [f"airl-fast {command}" for command in commands]
    assert not set(wanted) - {cell.entry for cell in CELLS}


def test_the_page_has_these_rows():
    text = page.PAGE.read_text("utf-8")
    assert page.written(text) == text, "run python -m tests.robustness.page"
    assert all(f"- {fault}: {meaning}" in text for fault, meaning in FAULTS.items())
