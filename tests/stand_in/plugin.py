"""pytest's plugin: load the device before torch is, then answer what Python asks of it."""

import ctypes
import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from tests.stand_in import ENVIRONMENT

device = ctypes.CDLL(os.environ[ENVIRONMENT])
for name in ("stand_in_held", "stand_in_most"):
    getattr(device, name).restype = ctypes.c_size_t
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from tests.stand_in import operators  # noqa: E402


def device_memory(what: str) -> int:
    """Bytes that tensors of the device hold, or held at most since they were forgotten."""
    found: int = getattr(device, f"stand_in_{what}")()
    return found


class Event:
    """Of a device on which everything is done by the time that one asks."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Stream:
    cuda_stream = 0


# Each a function of its own: torch.compile tells them apart by identity.
OF_A_HOPPER: dict[str, Any] = {
    "Event": Event,
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "current_stream": lambda device=None: Stream(),
    "device_count": lambda: 1,
    "device_of": lambda tensor: nullcontext(),
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "stand-in",
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "memory_allocated": lambda device=None: device_memory("held"),
    "max_memory_allocated": lambda device=None: device_memory("most"),
    "reset_peak_memory_stats": lambda device=None: device_memory("forget"),
    "is_current_stream_capturing": lambda: False,
    "set_device": lambda device: None,
    "set_rng_state": lambda state, device=None: None,
    "synchronize": lambda device=None: None,
}


def _cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole.clone().untyped_storage()


for name, value in OF_A_HOPPER.items():
    setattr(torch.cuda, name, value)
torch.UntypedStorage.clone = _cloned  # type: ignore[method-assign]
operators.register()


def pytest_configure(config: object) -> None:
    """The emulated CUDA kernels in the place of those that a GPU runs."""
    from airl_fast.ops import _cuda_extension, _cuda_rows, _cuda_spans
    from tests.cuda import emulation

    emulated = ModuleType("airl_fast._cuda")
    emulated.__dict__.update(vars(emulation.build()), architectures="80;90a")
    for module in (_cuda_extension, _cuda_rows, _cuda_spans):
        module.extension = lambda: emulated
