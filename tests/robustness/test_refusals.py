"""Every row of the table: what was received and what to do stand in the message."""

import json

import pytest

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
