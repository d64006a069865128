"""The audit of dependencies: planted versions and licences, the data and its age."""

import json
from datetime import UTC, date, datetime

import pytest

from audit import __main__ as audit
from audit.__main__ import Installed, affected, age, closure, is_allowed, is_inside, unlicensed

DATA = audit.read(audit.DATA)


def one(name="torch", version="2.13.0", licences=("MIT",)):
    return Installed(name=name, version=version, licences=tuple(licences))


def advisory(*events, name="torch"):
    part = {"package": {"ecosystem": "PyPI", "name": name},
            "ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}  # fmt: skip
    return {"id": "X-1", "summary": "a fault", "affected": [part]}


def test_what_is_installed_here_passes(capsys):
    assert audit.main([]) == 0
    said = capsys.readouterr().out
    assert "0 problems" in said
    assert "it is complete for none, and has nothing on the other" in said


@pytest.mark.parametrize(
    ("name", "version", "ids"),
    [
        ("torch", "2.5.1+cpu", "CVE-2025-32434"),
        ("transformers", "5.2.0", "CVE-2026-4372"),
        ("starlette", "1.0.0", "CVE-2026-48710, GHSA-86qp-5c8j-p5mr"),
        ("h11", "0.14.0", "CVE-2025-43859"),
        ("urllib3", "2.6.3", "CVE-2026-44431"),
        ("jinja2", "3.1.5", "CVE-2025-27516"),
        ("pyarrow", "23.0.0", "CVE-2026-25087"),
    ],
)
def test_a_planted_affected_version_is_named_with_its_remedy(name, version, ids):
    lines = list(affected([one(name, version)], DATA))
    assert any(f"{name} {version}: {ids}" in line and "or later" in line for line in lines)


def test_a_planted_version_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(audit, "closure", lambda _: ([one("h11", "0.14.0")], ["gone"]))
    assert audit.main([]) == 1
    said = capsys.readouterr().out
    assert "FAILED h11 0.14.0: CVE-2025-43859" in said
    assert "WARNING gone: needed by airl-fast[dev] and not installed" in said
    monkeypatch.setattr(audit, "closure", lambda _: ([one("new", "1", ["GPL-3.0-only"])], []))
    assert audit.main([]) == 1
    assert "FAILED new 1: GPL-3.0-only: expected one of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.9", False), ("1.0", True), ("1.9.9", True), ("2.0rc1", True), ("2.0", False),
     ("2.0+cpu", False), ("1.5.post1+cu13", True), ("3.0", True), ("3.2", True), ("3.2.1", False),
     ("10.0", False)],
)  # fmt: skip
def test_ranges_are_read_as_osv_says(version, inside):
    events = [{"introduced": "3.0"}, {"last_affected": "3.2"}, {"introduced": "1.0"},
              {"fixed": "2.0"}]  # fmt: skip
    assert is_inside(version, events) == inside
    found = list(affected([one(version=version)], {"advisories": [advisory(*events)]}))
    assert bool(found) == inside


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("(MIT OR GPL-3.0-only) AND BSD-3-Clause", False),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", True),
        ("", False),
    ],
)
def test_licences_are_expressions(expression, allowed):
    names = {"MIT", "Apache-2.0", "BSD-3-Clause"}
    assert is_allowed(expression, names) == allowed


def test_a_distribution_without_a_licence_or_with_another_is_named():
    lines = list(unlicensed([one("a", "1", []), one("b", "2", ["SSPL-1.0"]), one()], DATA))
    assert len(lines) == 2
    assert "a 1: no licence in its metadata: expected one of allowed_licences" in lines[0]
    assert "b 2: SSPL-1.0" in lines[1]
    assert not list(unlicensed([one("nvidia-cublas", "1", ["Proprietary"])], DATA))


def test_old_data_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "closure", lambda _: ([one()], []))
    today = datetime.now(UTC).date()
    assert age({"reviewed": "2026-01-01"}, date(2026, 4, 11)) == 100
    for days, warned in ((91, True), (0, False)):
        path = tmp_path / "data.json"
        reviewed = date.fromordinal(today.toordinal() - days).isoformat()
        path.write_text(json.dumps({**DATA, "reviewed": reviewed}))
        assert audit.main(["--data", str(path)]) == 0
        assert ("WARNING the advisories were reviewed" in capsys.readouterr().out) == warned


def test_data_that_says_nothing_is_refused(tmp_path):
    path = tmp_path / "data.json"
    for entry in (
        {"id": "X"},
        {"id": "X", "affected": [{"package": {"name": "torch"}, "ranges": []}]},
        {**advisory({"introduced": "0"}), "id": ""},
    ):
        path.write_text(json.dumps({**DATA, "advisories": [entry]}))
        with pytest.raises(ValueError, match="expected id, package and ranges"):
            audit.read(path)


def test_the_closure_follows_extras_and_names_what_is_missing():
    installed, missing = closure("airl-fast[serve]")
    names = {one.name for one in installed}
    assert {"airl-fast", "torch", "transformers", "fastapi", "starlette", "uvicorn", "h11"} <= names
    assert "pip" not in names
    assert not missing
    assert "fastapi" not in {one.name for one in closure("airl-fast")[0]}
    assert closure("no-such-distribution-at-all")[1] == ["no-such-distribution-at-all"]


def test_every_advisory_says_where_it_is_from():
    ids = [entry["id"] for entry in DATA["advisories"]]
    assert len(ids) == len(set(ids))
    for entry in DATA["advisories"]:
        assert entry["references"][0]["url"].startswith("https://")
        assert entry["summary"]
