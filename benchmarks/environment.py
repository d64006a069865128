"""What the numbers were measured with: hardware, versions, threads, load, date."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import airl_fast
from airl_fast.ops.dispatch import explain

_PACKAGES = ("torch", "triton", "numpy", "transformers", "trl", "liger-kernel")


def describe() -> dict[str, object]:
    """Everything that is the same for all rows of a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "gpu": _gpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": {
            "airl_fast": f"{airl_fast.__version__} ({_commit()})",
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "matrix_library": _matrix_library(),
        "backends": _backends(),
    }


def _backends() -> dict[str, str]:
    """What serves each operator on the GPU, or on a CPU where there is none."""
    rows = explain().rows
    return {row.op: row.backend for row in rows if row.device == rows[-1].device}


def hardware() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = info.is_file() and re.search(
        r"^model name\s*:\s*(.+)$", info.read_text("utf-8", "replace"), re.MULTILINE
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu() -> str | None:
    """Name, memory and driver of the GPU that torch uses, if there is one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gib = properties.total_memory / 2**30
    return f"{properties.name} ({gib:.0f} GiB, CUDA {torch.version.cuda})"


def slug(environment: dict[str, object]) -> str:
    """Name of the results' folder: GPU or processor, cores, and date."""
    name = environment.get("gpu") or f"{environment['hardware']} {environment['cores']} cores"
    words = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
    return f"{words}-{str(environment['date'])[:10]}"


def load() -> float | None:
    """Processes that wanted a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _matrix_library() -> str:
    found = re.search(r"(Intel\(R\).*Math Kernel Library Version \S+)", torch.__config__.show())
    return found[1] if found else "not MKL"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the checkout, with a mark if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"
    return done.stdout.strip()
