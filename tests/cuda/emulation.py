"""Build the CUDA kernels for the CPU: csrc/cuda/ as C++, over tests/cuda/emulator.h."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = [file for file in sorted(CSRC.glob("cuda/*.cu")) if file.stem != "device"]
SOURCES.append(HERE / "emulator.cpp")
FLAGS = [
    *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-U_FORTIFY_SOURCE"),  # which stops a longjmp to another stack
    *(f"-I{HERE}", f"-I{CSRC}/cuda"),
]


def fingerprint() -> str:
    """A hash of all that a build depends on."""
    digest = hashlib.sha256(repr((sys.version, torch.__version__, FLAGS)).encode())
    ours = [HERE / "emulator.h", HERE / "emulator.cpp"]
    for file in [*sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("cuda/*.*[uhp]*")), *ours]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++ to compile the CUDA kernels for the CPU with")
    return found


def build() -> ModuleType:
    """The extension `_cuda`, its kernels emulated: addresses are those of the CPU's memory.

    Kept in build/emulator/, one file per version of its sources.
    """
    include = Path(torch.__file__).parent / "include"
    if not (include / "pybind11").is_dir():
        pytest.skip("this torch has no pybind11 headers to build the bindings with")
    folder = CSRC.parent / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_cuda-{fingerprint()}.so"
    if not module.exists():
        python = sysconfig.get_path("include")
        command = [
            compiler(),
            "-x",
            "c++",
            "-O1",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            *FLAGS,
        ]
        command += [
            f"-isystem{include}",
            f"-isystem{python}",
            CSRC / "cuda" / "bindings.cpp",
            *SOURCES,
        ]
        unfinished = module.with_suffix(f".{os.getpid()}.part")  # several workers may build it
        subprocess.run([*command, "-o", unfinished], check=True)
        unfinished.rename(module)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
