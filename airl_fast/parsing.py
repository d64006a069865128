"""JSON that others wrote, and values of it in a message: whatever comes, in few words.

``json.loads`` answers deep nesting with a RecursionError and long numbers with a ValueError of its
own; it keeps the last of two equal keys in silence. A value may be as long as its file.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

_LONGEST = 300  # characters of a value in a message


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = self.maxlong = _LONGEST
        self.maxlist = self.maxtuple = self.maxdict = 8


def shown(value: Any) -> str:
    """``repr`` of a value of any size and depth, cut in the middle where it is long."""
    try:
        text = _Short().repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return f"a value of type {type(value).__name__} that is too large to show"
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2 - 2
    return f"{text[:half]}...{text[-half:]}"


def shown_names(names: Iterable[Any]) -> str:
    """Names for a message, cut where they are many; "nothing" where there are none."""
    text = ", ".join(map(shown, islice(names, 12)))
    return f"{text[:_LONGEST]}..." if len(text) > _LONGEST else text or "nothing"


def parse_json(text: str) -> Any:
    """Parse one JSON value; NaN and infinities are taken, as ``json.dumps`` writes them.

    Raises:
        ValueError: no JSON, and where; nested too deeply; a number that is too long; or an object
            with the same key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg} at {where}column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply to be read") from None


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: as ``parse_json``, or another value.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, received {shown(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"JSON with the key {shown(key)} twice in one object: keep one")
            seen.add(key)
    return found
