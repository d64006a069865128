"""What loading a model refuses before transformers does, in this package's words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


def known_device(device: str | torch.device) -> torch.device:
    """Return a device that this machine has.

    Raises:
        ValueError: it has none of that name.
    """
    remedy = "name one such as cpu, cuda or cuda:1; `airl-fast doctor` says what is here"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"expected a device, received {device!r}: {remedy}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"received {str(device)!r}, and torch sees {torch.cuda.device_count()} CUDA devices: "
            f"{remedy}"
        )
    return found


def default_device(device: str | None) -> str:
    """The one that a configuration names, or a GPU where there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_options(dtype: object, lora_rank: int) -> None:
    """Refuse what is no floating dtype, and a negative rank."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"expected a floating dtype, received {dtype!r}: pass a torch dtype such as "
            "torch.float32"
        )
    if lora_rank < 0:
        raise ValueError(
            f"expected a LoRA rank of 0 or more, received lora_rank={lora_rank}: 0 trains all "
            "weights"
        )


def check_folder(path: str, gguf_file: str | None) -> None:
    """Refuse a path that is neither a model's folder nor what a hub could have a name for."""
    remedy = "give a hub name, or the folder of a saved model"
    folder = Path(path)
    if folder.is_dir():
        wanted = gguf_file or "config.json"
        if not (folder / wanted).is_file():
            raise ValueError(f"{path} holds no {wanted}: {remedy}")
    elif folder.is_absolute() or path.startswith(".") or path.count("/") > 1 or not path:
        raise ValueError(f"{path!r}: no such folder; {remedy}")


@contextmanager
def whole_weights(path: object) -> Iterator[None]:
    """Say of weights that cannot be read whose they are and what to do.

    Raises:
        ValueError: a safetensors file is damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path}: a safetensors file (such as model.safetensors) is damaged ({error}); copy or "
            "train it again"
        ) from error
