"""Peak extra memory of every variant, measured in a process of its own.

What is read is the resident set of the process, so memory taken by C++ kernels and by the matrix
library counts, too. Linux keeps the peak (VmHWM) and resets it to the present value when "5" is
written to /proc/self/clear_refs; the peak after one call minus the resident set before it is the
extra memory, results included. For this to be true to the allocations, the worker runs with
MALLOC_MMAP_THRESHOLD_=65536 (buffers from 64 KiB up are returned to the system when they are freed,
so nothing is served from an earlier call's leftovers) and MKL_DISABLE_FAST_MM=1 (the matrix
library keeps none). The first call, which compiles and warms up, is not measured. Memory that is
reserved and never written does not count. The kernel counts pages core by core and adds them up in
batches, so a peak is known to within a few hundred KiB. On systems other than Linux the columns
stay empty.
"""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Row, Variant

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
_ROOT = Path(__file__).resolve().parent.parent


def supported() -> bool:
    """Whether this system can reset a process's peak."""
    return os.access(_CLEAR, os.W_OK)


def measure(settings: Any, rows: Sequence[Row], keys: Mapping[int, str]) -> None:
    """Fill ``peak_mib`` and ``result_mib`` of the rows that are right.

    Args:
        settings: of the suite; the worker builds the same cases from them.
        rows: the results so far; changed in place.
        keys: the key of each row's case, by the row's position; other rows are left out.
    """
    todo = [i for i in keys if rows[i].status == "ok"]
    while todo:
        wanted = [[keys[i], rows[i].peer, rows[i].backend] for i in todo]
        done = 0
        for done, found in enumerate(_worker(settings, wanted), start=1):
            row = rows[todo[done - 1]]
            row.peak_mib, row.result_mib = found["peak_mib"], found["result_mib"]
        if done < len(todo):  # the worker died over the next one, most likely for want of memory
            rows[todo[done]].facts["memory_worker_died"] = 1
            done += 1
        todo = todo[done:]


def _worker(settings: Any, wanted: list[list[str]]) -> Iterable[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.memory_worker", json.dumps(asdict(settings))]
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(json.dumps(wanted))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)


def peak_of(case: Case, variant: Variant) -> dict[str, float]:
    """Peak extra MiB of the second call of a variant, and MiB of its results."""
    prepared = variant.prepare(case.inputs())
    with variant.context():
        return peak_of_call(prepared.call)


def peak_of_call(call: Callable[[], Any]) -> dict[str, float]:
    """Peak extra MiB of the second call, and MiB of its results (tensors, or a dict of them)."""
    result = call()
    del result
    gc.collect()
    before = _resident("VmRSS")
    _CLEAR.write_text("5")
    result = call()
    peak = _resident("VmHWM")
    return {"peak_mib": max(0.0, peak - before), "result_mib": _mib(result)}


def _resident(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _mib(result: Any) -> float:
    tensors = result.values() if isinstance(result, Mapping) else [result]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20
