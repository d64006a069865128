"""Compile the CUDA sources of this folder; run as a script, print what each kernel needs.

    python csrc/cuda/nvcc.py            # registers, spills and barriers of every kernel
    python csrc/cuda/nvcc.py --ptxas    # what ptxas said, in its own words

setup.py and tests/cuda load this file by its path; it imports nothing but the standard library.
Objects are kept under build/nvcc/, by a hash of all that they depend on, with what ptxas said.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "nvcc"
DEFAULT_ARCHITECTURES = "80;90a"

# No contraction: a multiply-add is one only where it is written, so that the largest z of a row
# minus the row's maximum is exactly 0, and log p never above it.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "--threads=1")
HOST_FLAGS = "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden"


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    spilled_bytes: int
    stack_bytes: int


def find_nvcc() -> str | None:
    """Path of nvcc: that of CUDA_HOME where it is set, else the one in PATH; None without."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def wanted_nvcc() -> str | None:
    """The nvcc to build with, or None to go without, as AIRL_FAST_CUDA (0, 1 or auto) says.

    Raises:
        SystemExit: a value that is none of these, or 1 without an nvcc.
    """
    choice = os.environ.get("AIRL_FAST_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"AIRL_FAST_CUDA: expected 0, 1 or auto, received {choice!r}")
    if choice == "0" or (choice == "auto" and sys.platform == "win32"):
        return None
    found = find_nvcc()
    if found is None and choice == "1":
        raise SystemExit(
            "AIRL_FAST_CUDA=1, but there is no nvcc in CUDA_HOME/bin nor in PATH: install the CUDA "
            "toolkit (12.4 or newer), or leave AIRL_FAST_CUDA at auto to build without"
        )
    return found


def architectures() -> list[str]:
    """What to build for, as AIRL_FAST_CUDA_ARCHS says: "80;90a" unless it is set.

    Raises:
        SystemExit: a name that is no architecture.
    """
    names = os.environ.get("AIRL_FAST_CUDA_ARCHS", DEFAULT_ARCHITECTURES).split(";")
    for name in names:
        if not re.fullmatch(r"[0-9]{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
            raise SystemExit(
                "AIRL_FAST_CUDA_ARCHS: expected compute capabilities of 8.0 or above without their "
                f"points, such as {DEFAULT_ARCHITECTURES}, received {name!r}"
            )
    return names


def sources() -> list[Path]:
    """The CUDA sources, those that take longest first."""
    return sorted(HERE.glob("*.cu"), key=lambda file: (-file.stat().st_size, file.name))


def command(nvcc: str, names: Sequence[str]) -> list[str]:
    """The nvcc command line up to the source, for these architectures."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [nvcc, *FLAGS, HOST_FLAGS, *targets]


def compiled(nvcc: str, names: Sequence[str], source: Path, more: Sequence[str] = ()) -> Path:
    """Object file of a source; what ptxas said of it lies beside it, as .log.

    Raises:
        RuntimeError: nvcc refuses the source, or has a warning.
    """
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    line = [*command(nvcc, names), *more]
    digest = hashlib.sha256(version + repr(line).encode() + source.read_bytes())
    for header in sorted([*HERE.glob("*.h"), *HERE.glob("*.cuh"), *HERE.parent.glob("*.h")]):
        digest.update(header.name.encode() + header.read_bytes())
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.o")
    done = subprocess.run(
        [*line, "-c", str(source), "-o", str(unfinished)], capture_output=True, text=True
    )
    log = done.stdout + done.stderr
    if done.returncode != 0 or re.search(r"\bwarning\b", log):
        raise RuntimeError(
            f"nvcc on {source.name}: expected no error and no warning, received\n{log}\n"
            "AIRL_FAST_CUDA=0 builds without the CUDA kernels"
        )
    target.with_suffix(".log").write_text(log)
    unfinished.rename(target)
    return target


def compile_all(
    nvcc: str, names: Sequence[str], files: Sequence[Path], more: Sequence[str] = ()
) -> list[Path]:
    """Objects of all sources, as many compiled at a time as there are processors.

    ``more`` are the flags of the bindings (.cpp), which no kernel needs.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        flags = [more if file.suffix == ".cpp" else () for file in files]
        return list(pool.map(compiled, [nvcc] * len(files), [names] * len(files), files, flags))


def link(nvcc: str, objects: Sequence[Path], target: Path) -> None:
    """Link an extension with the CUDA runtime in it: importing it needs no CUDA library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    line = [nvcc, "-shared", "--cudart=static", *map(str, objects), "-o", str(target)]
    subprocess.run(line, check=True)


def kernels(log: str) -> list[Kernel]:
    """The kernels in what ptxas said."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name, architecture = _ptxas(r"'(.+?)' for '(.+?)'", part)
        stack, stores, loads = map(int, _ptxas(_STACK, part))
        (registers,) = map(int, _ptxas(r"Used (\d+) registers", part))
        found.append(Kernel(readable(name), architecture, registers, stores + loads, stack))
    return sorted(found, key=lambda kernel: (kernel.name, kernel.architecture))


_STACK = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"


def _ptxas(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern in what ptxas said of a kernel."""
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(
            f"ptxas: expected {pattern!r} in what it says of a kernel, received\n{text}\n"
            "this release words it in another way: change the pattern in csrc/cuda/nvcc.py"
        )
    return match.groups()


def readable(name: str) -> str:
    """A kernel's name without namespaces and arguments, where c++filt is at hand."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    plain = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(anonymous namespace\)::|airl_fast::(gpu::)?|^void ", "", plain)
    return plain.split("(")[0].replace("(bool)1", "true")


def table(rows: Sequence[Kernel]) -> str:
    """The kernels as lines to read."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'kernel':{width}}  arch    registers  spilled  stack"]
    lines += [
        f"{row.name:{width}}  {row.architecture:7} {row.registers:9}  {row.spilled_bytes:7}"
        f"  {row.stack_bytes:5}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Compile everything, and print the table, or what ptxas said."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("expected nvcc in CUDA_HOME/bin or in PATH: install the CUDA toolkit")
    objects = compile_all(nvcc, architectures(), sources())
    log = "".join(file.with_suffix(".log").read_text() for file in objects)
    print(log if "--ptxas" in sys.argv[1:] else table(kernels(log)))


if __name__ == "__main__":
    main()
