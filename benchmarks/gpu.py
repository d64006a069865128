"""``python -m benchmarks.gpu``: on a bare machine with a GPU, build, verify and time everything.

Needs torch, triton, transformers and, for the CUDA kernels, nvcc; fetches nothing: what else is
missing there is installed from wheels that lie in a folder (``--wheels``). It installs the
checkout, runs the tests of the GPU backends, and times operators, row kernels, segments, packing
and one whole step beside their peers, the most important first. What does not fit in the minutes
given is left out, and named; a case that fails or hangs is named, and the next goes on in a fresh
process (gpu_timing.py). Every case is on the disk when it has ended: FOLDER/cases.jsonl. At the
end come results.json, results.md and plots; ``airl-fast bench --report FILE`` draws them again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent
_TESTS = ("tests/cuda/test_on_gpu.py", "tests/kernels", "tests/test_varlen.py", "tests/gpu")
_LINES = "cases.jsonl"  # as gpu_timing.LINES, which can be imported only once the package is built


def main(arguments: list[str] | None = None) -> int:
    """Read the options and run; 1 if a result of this package was wrong or something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, verify and time everything on this machine's GPU.",
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="in all (default: %(default)g)")
    add("--case-minutes", type=float, default=2.5, help="for one case (default: %(default)g)")
    add("--quick", action="store_true", help="tiny shapes: does everything work? no speeds")
    add("--wheels", type=Path, metavar="DIR", help="wheels to install first, without a network")
    add("--no-build", dest="build", action="store_false", help="the package is installed already")
    add("--no-tests", dest="tests", action="store_false", help="time without the tests before it")
    add("--device", default="cuda", help="cpu tries the program out (default: %(default)s)")
    add("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    add("--output-dir", type=Path, metavar="DIR", help="default: benchmarks/results/GPU-DATE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU here; --device cpu tries it out", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    folder = options.output_dir or _folder(options.quick)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _LINES).unlink(missing_ok=True)
    failed = options.build and not _build(options.wheels)
    tests = _tests(deadline) if options.tests else None
    failed |= tests is not None and ("failed" in tests or "error" in tests)
    common = [*(["--quick"] if options.quick else []), "--rounds", str(options.rounds)]
    try:
        failed |= not _time(folder, common, options.device, deadline, 60 * options.case_minutes)
    finally:
        line = [] if tests is None else ["--tests", tests]
        done = subprocess.run(_command(folder, "--write", *common, *line), cwd=_ROOT)
    return 1 if failed or done.returncode else 0


def _folder(quick: bool) -> Path:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    date = datetime.now(UTC).date().isoformat()
    return _ROOT / "benchmarks" / "results" / (f"{words}-{date}" + ("-quick" if quick else ""))


def _command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_timing", str(folder.resolve()), *options]


def _build(wheels: Path | None) -> bool:
    """Install the wheels, and the checkout in place with its extensions; whether that went well."""
    print("building ...", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    steps = [[*install, "--editable", "."]]
    if wheels is not None:
        files = sorted(str(file.resolve()) for file in wheels.glob("*.whl"))
        steps.insert(0, [*install, "--no-index", *files])
    for command in steps:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
            return False
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return True


def _tests(deadline: float) -> str:
    """Pytest's closing line over the GPU backends, on the GPU."""
    print("tests ...", end=" ", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "--dist", "load", *_TESTS]
    limit = max(30.0, 0.4 * (deadline - time.monotonic()))
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=limit, env=known
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        shown = printed if isinstance(printed, str) else printed.decode("utf-8", "replace")
        print(shown[-6000:], file=sys.stderr)
        line = f"error: no end within {limit:.0f} s"
    else:
        line = (done.stdout.strip().splitlines() or ["error: nothing printed"])[-1]
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    print(line, file=sys.stderr)
    return line


def _time(folder: Path, common: list[str], device: str, deadline: float, limit: float) -> bool:
    """Time case after case; where a process ends early, the next begins with the next case.

    Returns whether every process began one: where none can, nothing is timed.
    """
    first = 0
    while (seconds := deadline - time.monotonic()) > 0:
        command = _command(folder, "--first", str(first), "--seconds", f"{seconds:.0f}", *common)
        process = subprocess.Popen([*command, "--device", device], cwd=_ROOT)
        killed = _watch(process, folder, deadline, limit)
        if process.returncode == 0:
            return True
        index, case, said = _last(folder)
        if index < first:
            print(f"no case was begun: exit status {process.returncode}", file=sys.stderr)
            return False
        if not said:
            why = killed or f"its process ended with status {process.returncode}"
            line = json.dumps({"index": index, "case": case, "failed": why})
            with (folder / _LINES).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        first = index + 1
    return True


def _watch(process: subprocess.Popen[bytes], folder: Path, deadline: float, limit: float) -> str:
    """Wait for the end; kill it where a case takes longer than ``limit``. Returns why, or ""."""
    seen, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now, size = time.monotonic(), (folder / _LINES).stat().st_size if _begun(folder) else 0
        if size != seen:
            seen, since = size, now
        late = f"no end within {limit:.0f} s" if now - since > limit else ""
        late = late or ("the time was over" if now > deadline + 30 else "")
        if late:
            process.kill()
            process.wait()
            return late
    return ""


def _begun(folder: Path) -> bool:
    return (folder / _LINES).is_file()


def _last(folder: Path) -> tuple[int, str, bool]:
    """Index and name of the last case that began, and whether it said what became of it."""
    if not _begun(folder):
        return -1, "", False
    line = json.loads((folder / _LINES).read_text("utf-8").splitlines()[-1])
    return line["index"], line["case"], "began" not in line


if __name__ == "__main__":
    sys.exit(main())
