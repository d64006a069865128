"""Text from outside as text in a page: nothing in it is markup, and nothing in it hides."""

import json
import re
from html import escape as _escape
from typing import Any

# Control characters, those that reorder what follows, and halves of surrogate pairs. The viewer's
# script has the same list.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Spell the characters that a page cannot show, such as NUL, as their code points."""
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def escape(text: str) -> str:
    """Return text as it may stand in an element or a quoted attribute."""
    return _escape(visible(text), quote=True)


def json_block(value: Any) -> str:
    """Return JSON as it may stand in a script element of a type that no browser runs.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
