"""What is taken from a model's folder: safetensors and plain values, no pickle, no code.

transformers and PEFT fall back to ``torch.load`` where a folder says so (an index that names .bin
files, an adapter saved as adapter_model.bin), and PEFT has methods whose settings run code from
a repository. Folders are checked before anything of them is loaded, and while a model is loaded
``torch.load`` is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from airl_fast.parsing import parse_object, shown

TRUST_VARIABLE = "AIRL_FAST_TRUST_REMOTE_CODE"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REMEDY = (
    "load it where you trust it, with transformers, and save it again: save_pretrained writes "
    "safetensors"
)
_loading = threading.RLock()


def check_model_folder(folder: Path, gguf_file: str | None = None) -> None:
    """Check a local folder before a model is loaded from it; a hub name is no folder and passes.

    Raises:
        ValueError: it has weights as pickles alone, an index of files that are no safetensors of
            this folder, an adapter that is no plain LoRA, a configuration that names code, or a
            GGUF file of another folder.
    """
    if gguf_file is not None and (Path(gguf_file).is_absolute() or ".." in Path(gguf_file).parts):
        raise ValueError(f"expected a GGUF file inside {folder}, received {shown(gguf_file)}")
    if not folder.is_dir() or gguf_file is not None:
        return
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX)
    if (folder / _ADAPTER).is_file():
        check_adapter(folder)
    if (folder / _CONFIG).is_file():
        _check_config(folder / _CONFIG)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has its weights as pickles ({', '.join(pickles[:3])}), which can run code: "
            f"expected safetensors; {_REMEDY}"
        )


def check_adapter(folder: Path) -> None:
    """Check a folder with an adapter before PEFT reads it.

    Raises:
        ValueError: its weights are no safetensors, or it is no plain LoRA.
    """
    config = _object(folder / _ADAPTER)
    if config.get("peft_type") != "LORA" or config.get("megatron_config") is not None:
        raise ValueError(
            f"{folder / _ADAPTER}: expected a plain LoRA adapter, received peft_type="
            f"{shown(config.get('peft_type'))} and megatron_config="
            f"{shown(config.get('megatron_config'))}: other methods may load code or tokenizers "
            "from elsewhere; merge the adapter into its model"
        )
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {_ADAPTER_WEIGHTS}: {_REMEDY}")


def check_remote_code(asked: bool, said: bool, where: Path) -> None:
    """Whether code of a repository may run: a folder's word alone is not enough.

    Args:
        asked: what the caller asks for.
        said: what the folder says that it was trained with.
        where: the folder.

    Raises:
        ValueError: the folder wants code to run and nobody here asked for it.
    """
    if said and not asked and os.environ.get(TRUST_VARIABLE) != "1":
        raise ValueError(
            f"{where} was trained with trust_remote_code=True: loading it runs code from its base "
            f"model's repository. If you trust that, set {TRUST_VARIABLE}=1"
        )


@contextmanager
def no_pickle() -> Iterator[None]:
    """Refuse ``torch.load``, in every thread, until the block ends: models are loaded in it."""

    def refuse(file: Any, *_: Any, **__: Any) -> Any:
        raise ValueError(f"{shown(str(file))} is a pickle, expected safetensors: {_REMEDY}")

    with _loading:
        before = torch.load
        torch.load = refuse  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.load = before


def _check_index(path: Path) -> None:
    names = _object(path).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{path}: 'weight_map' is {shown(names)}, expected an object")
    for name in names.values():
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {shown(name)}: expected safetensors files in its folder; {_REMEDY}"
            )


def _check_config(path: Path) -> None:
    """Refuse what has made transformers run code unasked (CVE-2026-4372, CVE-2026-5241)."""
    waiting: list[Any] = [_object(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
            for key, value in node.items():
                code = "attn_implementation" in key and isinstance(value, str) and "/" in value
                if code or (key == "trust_remote_code" and value):
                    raise ValueError(
                        f"{path}: {shown(key)} is {shown(value)}, which asks for code from "
                        "elsewhere: remove it if you trust the rest of the folder"
                    )


def _object(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
