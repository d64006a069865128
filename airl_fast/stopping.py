"""SIGTERM and Ctrl-C end a run after the step that it is in, not within it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Within ``with``, asks a run to stop; give it to ``Trainer`` as ``should_stop``.

    SIGTERM and the first Ctrl-C (SIGINT) set ``received`` and say so on standard error. Ctrl-C
    once more raises KeyboardInterrupt where the program stands. A signal that the process ignores
    (``nohup``, a shell's background jobs) stays ignored. The handlers are put back at the end.

    Args:
        then: called once, when the first signal comes.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.then = then
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether the run was asked to stop."""
        return self.received is not None

    @property
    def status(self) -> int:
        """The exit status of a run that stopped and saved: 130 after Ctrl-C, else 0."""
        return 130 if self.received is signal.SIGINT else 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "StopSignals was entered in another thread than the main one, where Python takes "
                "no signals; enter it in the main thread, and give the trainer its should_stop"
            )
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            text = "finishing the step, then saving it; Ctrl-C stops at once"
            # Not print: the signal may have come within another write to the same stream.
            os.write(2, f"airl-fast: {self.received.name}: {text}\n".encode())
            self.then()
