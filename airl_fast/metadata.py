"""The description beside saved weights: of what kind they are, and how to load them."""

import json
from pathlib import Path
from typing import Any

import torch

from airl_fast.parsing import parse_object, shown

METADATA = "airl_fast.json"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_metadata(directory: Path, kind: str) -> dict[str, Any]:
    """Read the description beside saved weights and check that it is of the expected kind."""
    path = directory / METADATA
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {METADATA}: expected a {kind} saved by airl_fast; give the "
            "folder that training wrote (DIR/policy or DIR/reward)"
        )
    try:
        metadata = parse_object(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; train again, or restore it from a copy") from None
    if metadata.get("kind") != kind:
        raise ValueError(f"{directory} holds a {shown(metadata.get('kind'))}, expected a {kind!r}")
    return metadata


def write_metadata(directory: Path, kind: str, values: dict[str, Any]) -> None:
    """Write the description that ``read_metadata`` reads."""
    text = json.dumps({"format": 1, "kind": kind, **values}, indent=2, sort_keys=True)
    (directory / METADATA).write_text(text + "\n")


def saved_dtype(directory: Path, description: dict[str, Any]) -> torch.dtype:
    """The dtype that a description names.

    Raises:
        ValueError: it names none that weights are saved in.
    """
    name = description.get("dtype")
    if name not in _DTYPES:
        raise ValueError(
            f"{directory / METADATA}: expected a dtype of {', '.join(_DTYPES)}, received "
            f"{shown(name)}; restore it from a copy"
        )
    found: torch.dtype = getattr(torch, name)
    return found
