"""Worker processes of several runs: how they are told to stop, and how they go on."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airl_fast.durable import explained, make_folder, write_text
from airl_fast.stopping import StopSignals

if TYPE_CHECKING:
    from airl_fast.config import RunConfig
    from airl_fast.trainer import Trainer

_asked: Any = None  # in a worker: the event that says to stop


class StoppedError(Exception):
    """Asked to stop, and every run has saved its step.

    Attributes:
        status: the exit status, 0 after SIGTERM and 130 after Ctrl-C.
    """

    status = 0


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that finish their steps on SIGTERM or Ctrl-C, and end at once on another.

    Raises:
        StoppedError: a signal came before the block was done.
    """
    context = get_context("spawn")
    asked = context.Event()
    made = ProcessPoolExecutor(workers, context, initializer=begin, initargs=(asked,))
    with StopSignals(then=asked.set) as stop:
        try:
            yield made
        except StoppedError as error:
            made.shutdown(cancel_futures=True)  # waits until every run has saved
            stopped = StoppedError(f"stopped by {stop.received.name}" if stop.received else "")
            stopped.status = stop.status
            raise stopped from error
        except KeyboardInterrupt:
            for process in active_children():
                process.kill()
            raise
        finally:
            made.shutdown(cancel_futures=True)


def begin(asked: Any) -> None:
    """Set up a worker: one thread, nothing on the terminal, signals left to the parent."""
    import torch
    from transformers.utils import logging

    global _asked
    _asked = asked
    for number in (signal.SIGTERM, signal.SIGINT):  # a terminal's Ctrl-C goes to every process
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check() -> None:
    """End this job here if it was asked to stop.

    Raises:
        StoppedError: it was.
    """
    if _asked is not None and _asked.is_set():
        raise StoppedError("asked to stop")


def train(config: RunConfig) -> Trainer:
    """Run to the end, or to the end of the step in which it is asked to stop.

    Raises:
        StoppedError: it was asked to, and has saved the step.
    """
    from airl_fast.trainer import Trainer

    check()
    gc.collect()  # the models of an earlier job are in cycles
    trainer = Trainer(config, should_stop=lambda: _asked is not None and _asked.is_set())
    trainer.train()
    if trainer.step < trainer.total_steps:
        raise StoppedError("asked to stop")
    return trainer


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(found.keys() | settings.keys()):
        one, other = found.get(key), settings.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{key}.{rest}" for rest in _differences(one, other))
        elif one != other:
            yield f"{key}={json.dumps(one)}"


Settings = Mapping[str, Any]


def open_folder(
    folder: Path,
    settings: Settings,
    what: str,
    bound: Callable[[Settings, Settings], tuple[Settings, Settings]] = lambda old, new: (old, new),
) -> None:
    """Make the folder of a demo or study, or take up one that was made with the same settings.

    Args:
        folder: new, empty, or with WHAT.json in it.
        settings: JSON-able.
        what: "demo" or "study".
        bound: of the folder's settings and these, what has to be the same.

    Raises:
        ValueError: the folder holds something else, or one of other settings.
        WriteError: it cannot be written to.
    """
    text, file = json.dumps(settings) + "\n", folder / f"{what}.json"
    if folder.exists() and any(folder.iterdir()):
        if not file.is_file():
            raise ValueError(f"{folder} is not empty: choose another --output-dir or delete it")
        if differences := list(_differences(*bound(_settings(file), json.loads(text)))):
            raise ValueError(
                f"{folder} holds a {what} of other settings, {', '.join(differences)}: give them "
                "again to go on with it, or choose another --output-dir"
            )
    with explained(str(folder)):
        make_folder(folder)
        write_text(file, text)
