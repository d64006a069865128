"""Compile the device."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"


def build() -> Path:
    """The library; kept in build/stand_in/, one file per version of its source and of torch."""
    if not sys.platform.startswith("linux") or torch.version.cuda or torch.version.hip:
        pytest.skip("the stand-in for a GPU is for torch's build for CPUs, on Linux")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the stand-in for a GPU with")
    root = Path(torch.__file__).parent
    version = hashlib.sha256(f"{torch.__version__}{SOURCE.read_text()}".encode()).hexdigest()
    folder = HERE.parents[1] / "build" / "stand_in"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"device-{version[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.part")  # several workers may build it
        command = [
            *(compiler, "-std=c++20", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"),
            *(f"-isystem{root}/include", f"-isystem{root}/include/torch/csrc/api/include"),
            *(str(SOURCE), "-o", str(unfinished)),
            *(f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"),
        ]
        subprocess.run(command, check=True)
        unfinished.rename(library)
    return library
