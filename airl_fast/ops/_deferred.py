"""Checks of values: at once on a CPU, without waiting for it on a GPU.

To look at a value on a GPU the CPU has to wait for all that was asked of it before. A check there
leaves a report instead (whether it failed, where, and the value), copied to the CPU's memory when
the GPU gets to it. Reports that have arrived are read by the next check of any operator and by
`raise_failed`: the error comes late, as CUDA's own do, and says so. Until then the kernels keep
inside their buffers whatever the values are, and a row with a target out of range is NaN.

``AIRL_FAST_BLOCKING=1`` makes every check wait, so that the error is raised where it was made.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ENV = "AIRL_FAST_BLOCKING"
_MOST = 4096  # reports that may be under way; a further one waits for the first
_LATE = (
    "; found on the GPU after the call had returned: set AIRL_FAST_BLOCKING=1 to have the error "
    "where the call is"
)

Words = Callable[..., str]  # index and values of the first failure -> the message


class _Report(NamedTuple):
    arrived: torch.cuda.Event | None
    found: Tensor  # in the CPU's memory: failed, index, values
    words: Words
    error: type[ValueError] = ValueError


_reports: deque[_Report] = deque()
_lock = threading.Lock()  # backward passes run in threads of their own


def defers(device: torch.device) -> bool:
    """Whether checks on this device leave a report instead of waiting."""
    return device.type == "cuda" and os.environ.get(_ENV, "0") in ("", "0")


def refuse_where(
    bad: Tensor, values: Tensor, words: Words, error: type[ValueError] = ValueError
) -> None:
    """Raise at the first place where ``bad [N]`` holds, now or when the GPU has got there.

    Args:
        bad: ``[N]`` bool.
        values: ``[N]`` or ``[N, k]`` of any number type, what the message is to show.
        words: makes the message from the index and the value, or the k values, there.
        error: what is raised.

    Raises:
        ValueError: it holds somewhere, or an earlier report says so.
    """
    if bad.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be read back from a graph
    raise_failed()
    if not bad.numel():
        return
    if not defers(bad.device):
        if bad.any():
            first = int(bad.nonzero()[0])
            raise error(words(first, *values[first].reshape(-1).tolist()))
        return
    kind = torch.float64 if values.is_floating_point() else torch.int64
    first_bad = bad.to(torch.int8).argmax(0, keepdim=True)
    there = values.index_select(0, first_bad).reshape(-1)
    _send(torch.cat([bad.any()[None].to(kind), first_bad.to(kind), there.to(kind)]), words, error)


def raise_failed(*, wait: bool = False) -> None:
    """Raise the first failure among the reports that have arrived.

    Args:
        wait: for all of them, which waits for the GPU.

    Raises:
        ValueError: a check failed.
    """
    while True:
        with _lock:
            if not _reports:
                return
            report = _reports[0]
            if report.arrived is not None and not report.arrived.query():
                if not wait and len(_reports) <= _MOST:
                    return
                report.arrived.synchronize()
            _reports.popleft()
        failed, index, *values = report.found.tolist()
        if failed:
            raise report.error(report.words(int(index), *values) + _LATE)


def _send(report: Tensor, words: Words, error: type[ValueError]) -> None:
    arrived = None
    found = report
    if report.is_cuda:
        found = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        found.copy_(report, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(report.device))
    with _lock:
        _reports.append(_Report(arrived, found, words, error))


def sound_offsets(cu: Tensor, total: int) -> Tensor:
    """Offsets that never decrease and run from 0 to ``total``, whatever ``cu [n + 1]`` holds.

    Equal to ``cu`` where it does so already. Nothing waits for a GPU.
    """
    if cu.shape[0] < 2:
        return torch.zeros_like(cu)
    inner = cu.clamp(0, total).cummax(0).values[1:-1]
    ends = cu.new_zeros(1), cu.new_full((1,), total)
    return torch.cat([ends[0], inner, ends[1]])
