"""JSON and text made wrong on purpose: what byte flips seldom reach.

A value somewhere in a tree is replaced by one that readers trip over (huge numbers, NaN, deep
nesting, lone surrogates, NUL bytes, other types), a key is dropped, given twice or added; then the
text as a whole is spoilt (a byte-order mark, other encodings, cut off, a line repeated).
Everything is a function of the random generator that is given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any


class Raw:
    """JSON text that ``json.dumps`` would not write, put into a tree as a value."""

    def __init__(self, text: str) -> None:
        self.text = text


_DEEP = 20_000
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, -0.0, 1e308, 2**31, 2**63, -(2**63) - 1, 10**400,
    "", " ", "\0", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "NaN", "x" * 100_000,
    "</script><script>alert(1)</script>", "../../etc/passwd", "{{7*7}}", "%s%n",
    [], {}, [[]], [None], {"": None}, [{}], [0.5], ["a", 1], [True], {"a": {"a": []}},
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), Raw("-1e400"), Raw("1" * 5000),
    Raw("[" * _DEEP + "]" * _DEEP), Raw('{"a":' * _DEEP + "1" + "}" * _DEEP), Raw("[" * 500),
    Raw('{"a": 1, "a": 2}'), Raw("01"), Raw("'a'"), Raw('"\\u00"'), Raw(""), Raw("1" * 4300),
)  # fmt: skip


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed."""
    tree = _copy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return _nasty(rng)
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            holder[key] = _nasty(rng)
        elif action < 0.75:
            del holder[key]
        elif action < 0.9:
            other, name = rng.choice(places)
            holder[key] = _copy(other.get(name) if isinstance(other, dict) else _at(other, name))
        elif isinstance(holder, dict):
            holder[rng.choice(("", "id", "label", "steps", "\ud800", "x" * 1000))] = _nasty(rng)
        else:
            holder.extend([holder[key]] * rng.choice((1, 2, 300)))
    return tree


def dumps(tree: Any) -> bytes:
    """JSON text of a tree that may hold ``Raw``; lone surrogates as escapes."""
    return _text(tree).encode("utf-8", "surrogatepass")


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Change the text as a whole, or a few bytes of it."""
    kinds: Sequence[Callable[[bytes], bytes]] = (
        lambda d: b"\xef\xbb\xbf" + d,
        lambda d: d.decode("utf-8", "replace").encode("utf-16"),
        lambda d: d[: rng.randrange(len(d) + 1)],
        lambda d: d + d,
        lambda d: d.replace(b"\n", b"\r\n"),
        lambda d: d.replace(b"\n", b""),
        lambda d: _flipped(d, rng),
        lambda d: d.replace(b'"', b"'"),
        lambda d: d + b"\0" * 8,
        lambda d: d.replace(b" ", b"\xff", 1),
        lambda d: b"\n\n" + d,
    )
    return rng.choice(kinds)(data)


def mutated(seeds: Sequence[Any], rng: random.Random) -> bytes:
    """A seed as JSON, made wrong: its tree, its text, or both; now and then neither."""
    tree, action = rng.choice(seeds), rng.random()
    if action < 0.85:
        tree = mutate_tree(tree, rng)
    data = dumps(tree)
    return spoil(data, rng) if 0.75 < action < 0.97 else data


def _nasty(rng: random.Random) -> Any:
    return _copy(rng.choice(NASTY))


def _at(values: list[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict | list):
            continue
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            waiting.append(node[key])
    return found


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _text(tree: Any) -> str:
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, dict):
        inside = ", ".join(f"{json.dumps(key)}: {_text(value)}" for key, value in tree.items())
        return f"{{{inside}}}"
    if isinstance(tree, list):
        return f"[{', '.join(map(_text, tree))}]"
    return json.dumps(tree)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice(b'\x00\xff{}[]",:\\-1eN\n')
    return bytes(changed)
