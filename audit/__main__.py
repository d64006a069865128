"""Audit what is installed, without a network: ``python -m audit``.

Every distribution that ``airl-fast[dev]`` needs, directly or not, is held against advisories.json
(entries in the form of OSV, https://ossf.github.io/osv-schema/) and against the licences that are
allowed there. The installer (pip) is no dependency and is not looked at.

The data is a list of what was looked up by hand, and complete for nothing: silence is no proof.
Exit status 1: an affected version, or a licence outside the list.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DATA = Path(__file__).parent / "advisories.json"
_OLD = 90  # days


@dataclass(frozen=True, kw_only=True)
class Installed:
    """One distribution: its canonical name, version and licences as its metadata states them."""

    name: str
    version: str
    licences: tuple[str, ...]


def closure(root: str) -> tuple[list[Installed], list[str]]:
    """What a requirement needs here, and the names of what is needed and not installed."""
    waiting, seen = [Requirement(root)], set()
    known = cache(distribution)  # reading metadata is slow
    found: dict[str, Installed] = {}
    missing: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in ("", *wanted.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                dist = known(wanted.name)
            except PackageNotFoundError:
                missing.add(name)
                break
            if name not in found:
                found[name] = Installed(name=name, version=dist.version, licences=licences(dist))
            for text in dist.requires or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return sorted(found.values(), key=lambda one: one.name), sorted(missing)


def licences(dist: Distribution) -> tuple[str, ...]:
    """The SPDX expression of a distribution, else its classifiers, else its free text's start."""
    expression = dist.metadata.get("License-Expression")
    if expression:
        return (expression,)
    classifiers = [
        line.rsplit(" :: ", 1)[1]
        for line in dist.metadata.get_all("Classifier") or ()
        if line.startswith("License :: ") and not line.endswith("OSI Approved")
    ]
    text = (dist.metadata.get("License") or "").strip().split("\n")[0][:60]
    return tuple(classifiers) or ((text,) if text else ())


def read(path: Path) -> dict[str, Any]:
    """Read and check the data.

    Raises:
        ValueError: an entry without an id, a package or a range.
    """
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    date.fromisoformat(data["reviewed"])
    for entry in data["advisories"]:
        for affected in entry.get("affected") or [{}]:
            ranges = affected.get("ranges", [])
            if not entry.get("id") or "name" not in affected.get("package", {}) or not ranges:
                raise ValueError(f"{path}: expected id, package and ranges, received {entry}")
            for span in ranges:
                for event in span["events"]:
                    Version(next(iter(event.values())))
    return data


def affected(installed: Iterable[Installed], data: dict[str, Any]) -> Iterator[str]:
    """A line for every installed version that an advisory names."""
    versions = {one.name: one.version for one in installed}
    for entry in data["advisories"]:
        for part in entry["affected"]:
            name = canonicalize_name(part["package"]["name"])
            if name in versions and any(
                is_inside(versions[name], span["events"]) for span in part["ranges"]
            ):
                fixed = [e["fixed"] for span in part["ranges"] for e in span["events"]
                         if "fixed" in e]  # fmt: skip
                ids = ", ".join([entry["id"], *entry.get("aliases", [])])
                remedy = f"install {' or '.join(fixed)}, or later" if fixed else "no fix is known"
                yield f"{name} {versions[name]}: {ids}: {entry['summary']}; {remedy}"


def is_inside(version: str, events: Sequence[dict[str, str]]) -> bool:
    """Whether a version is affected by the events of one range: introduced, fixed, last_affected.

    A local part (2.13.0+cpu) is not compared.
    """
    public = Version(Version(version).public)
    inside = False
    for event in sorted(events, key=lambda event: Version(next(iter(event.values())))):
        kind, text = next(iter(event.items()))
        if kind == "introduced" and public >= Version(text):
            inside = True
        elif (kind == "fixed" and public >= Version(text)) or (
            kind == "last_affected" and public > Version(text)
        ):
            inside = False
    return inside


def unlicensed(installed: Iterable[Installed], data: dict[str, Any]) -> Iterator[str]:
    """A line for every distribution whose licences are not all allowed."""
    allowed = set(data["allowed_licences"])
    for one in installed:
        if any(fnmatch(one.name, pattern) for pattern in data["licence_exceptions"]):
            continue
        wrong = [text for text in one.licences if not is_allowed(text, allowed)]
        if wrong or not one.licences:
            said = "; ".join(wrong) or "no licence in its metadata"
            yield (
                f"{one.name} {one.version}: {said}: expected one of allowed_licences; read it, "
                "then add it there or to licence_exceptions with a reason, or drop the dependency"
            )


def is_allowed(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression, or another name of a licence, is covered.

    Of alternatives one has to be allowed; with parentheses, every licence that is named.
    """
    if expression in allowed:
        return True
    names = re.sub(r" WITH [\w.-]+", "", expression)
    if "(" in names:
        every = re.split(r" AND | OR ", names.replace("(", "").replace(")", ""))
        return all(name.strip() in allowed for name in every)
    return any(
        all(name.strip() in allowed for name in choice.split(" AND "))
        for choice in names.split(" OR ")
    )


def age(data: dict[str, Any], today: date) -> int:
    """Days since the data was reviewed."""
    return (today - date.fromisoformat(data["reviewed"])).days


def main(argv: Sequence[str] | None = None) -> int:
    """Audit, and say what was found and how much that is worth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", default="airl-fast[dev]", metavar="REQUIREMENT",
                        help="whose dependencies (default: %(default)s)")  # fmt: skip
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE.json")
    parser.add_argument("--days", type=int, default=_OLD, metavar="N",
                        help="older data is warned of (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args(argv)
    data = read(arguments.data)
    installed, missing = closure(arguments.root)
    problems = [*affected(installed, data), *unlicensed(installed, data)]
    for line in problems:
        print(f"FAILED {line}")
    for name in missing:
        print(f"WARNING {name}: needed by {arguments.root} and not installed; not audited")
    days = age(data, datetime.now(UTC).date())
    if days > arguments.days:
        print(f"WARNING the advisories were reviewed {days} days ago: look again, and set "
              "'reviewed' in the data")  # fmt: skip
    packages = {part["package"]["name"] for e in data["advisories"] for part in e["affected"]}
    names = {one.name for one in installed}
    print(
        f"{len(installed)} distributions, {len(problems)} problems. The data has "
        f"{len(data['advisories'])} advisories of {len(packages & names)} of them, reviewed by "
        f"hand on {data['reviewed']}; it is complete for none, and has nothing on the other "
        f"{len(names - packages)}."
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
