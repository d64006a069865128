"""What this machine has: versions, devices, the backend of every operator, and missing extras.

Versions are read from package metadata, so that looking at a package never imports it.
"""

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import airl_fast
from airl_fast.ops.dispatch import Explanation, explain

if TYPE_CHECKING:
    from rich.console import RenderableType

_PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "numpy", "safetensors")

# extra -> (the distributions it installs, what they add)
_NOT_YET = "nothing in this version; kept for "
EXTRAS = {
    "liger": (("liger-kernel",), "a peer in the benchmarks, on a GPU"),
    "flash": (("flash-attn",), "flash-attention for packed batches, on a GPU (else torch's own)"),
    "vllm": (("vllm",), _NOT_YET + "rollouts sampled by vLLM, on a GPU"),
    "report": (("matplotlib",), "charts saved as PDF or PNG; report.html needs nothing"),
    "serve": (
        ("fastapi", "uvicorn", "prometheus-client"),
        "airl-fast serve: the reward over HTTP",
    ),
    "trl": (("trl",), "the reward inside TRL's GRPOTrainer"),
    "gguf": (("gguf",), "models read from GGUF files"),
    "fuzz": (("atheris",), "longer fuzzing, from a checkout"),
}


@dataclass(frozen=True)
class Extra:
    """One optional group of packages; ``missing`` is empty when it is installed."""

    name: str
    adds: str
    missing: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f'pip install "airl-fast[{self.name}]"'


@dataclass(frozen=True)
class Report:
    """What ``doctor()`` found. ``rich.print`` shows it as tables, ``str`` as lines of text."""

    versions: dict[str, str | None]  # None: not installed
    devices: dict[str, str]
    extension: str | None  # the file of airl_fast._C, None when it is not built
    operators: Explanation | str  # a string says why the operators cannot be imported
    extras: tuple[Extra, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is broken here, each with its remedy; empty when all is well."""
        found = []
        if self.extension is None:
            found.append("airl_fast._C is not built: run 'pip install -e .' (needs a C++ compiler)")
        if isinstance(self.operators, str):
            found.append(f"the operators cannot be imported: {self.operators}")
        absent = [
            name
            for name, found_version in self.versions.items()
            if found_version is None and (name != "triton" or "cuda:0" in self.devices)
        ]
        if absent:
            found.append(f"not installed: {', '.join(absent)}: run 'pip install airl-fast'")
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from (f"{name}: {found or 'not installed'}" for name, found in self.versions.items())
        yield from (f"{name}: {text}" for name, text in self.devices.items())
        yield f"airl_fast._C: {self.extension or 'not built'}"
        yield str(self.operators)
        for extra in self.extras:
            state = f"missing; {extra.remedy}" if extra.missing else "installed"
            yield f"[{extra.name}] {state}: {extra.adds}"
        yield from (f"problem: {text}" for text in self.problems)

    def __rich__(self) -> "RenderableType":
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        def table(title: str, *columns: str) -> Table:
            made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            for name in columns:
                made.add_column(name, overflow="fold")
            return made

        packages = table("Versions", "package", "version")
        for name, found in self.versions.items():
            packages.add_row(name, found or Text("not installed", "yellow"))
        machine = table("Machine", "part", "found")
        for name, text in self.devices.items():
            machine.add_row(name, Text(text))
        machine.add_row("airl_fast._C", Text(self.extension or "not built"))
        parts: list[RenderableType] = [packages, machine]
        if isinstance(self.operators, Explanation):
            served = table("Operators", "operator", "device", "backend", "why not the others")
            for row in self.operators.rows:
                backend = Text(row.backend, "green")
                served.add_row(row.op, row.device, backend, Text(row.why_not, "dim"))
            parts.append(served)
        optional = table("Extras", "extra", "state", "what it adds")
        for extra in self.extras:
            state = Text(extra.remedy, "yellow") if extra.missing else Text("installed", "green")
            optional.add_row(extra.name, state, extra.adds)
        parts.append(optional)
        parts.extend(Text(f"problem: {text}", "bold red") for text in self.problems)
        return Group(*parts)


def doctor() -> Report:
    """Look at this machine and this installation; nothing is changed, no model is loaded."""
    versions: dict[str, str | None] = {
        "airl_fast": airl_fast.__version__,
        "python": platform.python_version(),
    }
    versions.update({name: _version(name) for name in _PACKAGES})
    found = importlib.util.find_spec("airl_fast._C")
    operators: Explanation | str
    try:
        operators = explain()
    except ImportError as error:
        operators = str(error)
    return Report(
        versions=versions,
        devices=_devices(),
        extension=found.origin if found else None,
        operators=operators,
        extras=tuple(
            Extra(name, adds, tuple(p for p in packages if _version(p) is None))
            for name, (packages, adds) in EXTRAS.items()
        ),
    )


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, usable cores: "
        f"{_usable_cores()}, torch threads: {torch.get_num_threads()}",
    }
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        devices["cuda"] = f"none ({f'torch built for {built}' if built else 'torch without CUDA'})"
        return devices
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability "
            f"{gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
        )
    return devices


def _usable_cores() -> int | None:
    """Cores this process may run on, where the system says so (Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere, and on some ARM machines, the generic name
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
