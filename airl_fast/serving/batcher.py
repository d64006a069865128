"""One thread that owns the model and scores what many callers ask for in shared passes."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from airl_fast.encoding import EncodedPair
from airl_fast.scores import Scored

Score = Callable[[Sequence[EncodedPair]], list[Scored]]


class QueueFull(Exception):  # noqa: N818  # what happened, as queue.Full
    """Too many callers wait; ``retry_after`` is in how many seconds they should be done."""

    def __init__(self, limit: int, retry_after: int) -> None:
        super().__init__(
            f"{limit} requests are waiting already, which is the limit: ask again in "
            f"{retry_after} s, or let the server wait for more"
        )
        self.retry_after = retry_after


class NonFiniteScore(Exception):  # noqa: N818
    """The model made NaN or infinity of an input."""


@dataclass(frozen=True, kw_only=True)
class BatcherStats:
    """What has been done so far, and what waits."""

    passes: int
    tokens: int
    waiting: int
    waiting_tokens: int


@dataclass(kw_only=True)
class _Job:
    pairs: Sequence[EncodedPair]
    future: Future[list[Scored]] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return sum(len(pair.prompt) + len(pair.completion) for pair in self.pairs)


class Batcher:
    """Collects waiting jobs up to a token budget and scores them together, in their order.

    A job is the pairs of one caller. If a shared pass fails, its jobs are scored one by one, so
    that one bad input fails nobody else. A job that was cancelled before its turn is not scored.

    Args:
        score: as ``RewardScorer.score_encoded``; only the batcher's thread calls it.
        token_budget: tokens of the jobs that are taken together; a larger job goes alone.
        limit: jobs that may wait.
        on_pass: called after every pass with its jobs and tokens.
        daemon: whether the process may end while jobs are waiting.
    """

    def __init__(
        self,
        score: Score,
        *,
        token_budget: int = 16384,
        limit: float = math.inf,
        on_pass: Callable[[int, int], None] | None = None,
        daemon: bool = True,
    ) -> None:
        self._score = score
        self._token_budget = token_budget
        self._limit = limit
        self._on_pass = on_pass
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._passes = self._tokens = 0
        self._busy = 0.0  # seconds spent scoring
        self._thread = threading.Thread(target=self._run, name="airl-fast-scorer", daemon=daemon)
        self._thread.start()

    def submit(self, pairs: Sequence[EncodedPair]) -> Future[list[Scored]]:
        """Queue a job.

        Returns:
            A future of one ``Scored`` per pair; its error is that of the model, or
            ``NonFiniteScore``. Cancel it to give the job up.

        Raises:
            QueueFull: too many are waiting.
            RuntimeError: the batcher is closed.
        """
        job = _Job(pairs=pairs)
        with self._changed:
            if self._closing:
                raise RuntimeError("this batcher is closed: nothing is scored any more")
            if len(self._jobs) >= self._limit:
                self._drop_cancelled()
            if len(self._jobs) >= self._limit:
                raise QueueFull(len(self._jobs), self._seconds_of_waiting())
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def stats(self) -> BatcherStats:
        """Count passes, tokens and what is waiting."""
        with self._changed:
            waiting = [job for job in self._jobs if not job.future.cancelled()]
            return BatcherStats(
                passes=self._passes,
                tokens=self._tokens,
                waiting=len(waiting),
                waiting_tokens=sum(job.tokens for job in waiting),
            )

    def close(self) -> None:
        """Finish what is waiting, take nothing more, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            start, tokens = time.monotonic(), sum(job.tokens for job in jobs)
            outcomes = self._outcomes(jobs)
            with self._changed:
                self._busy += time.monotonic() - start
                self._passes += 1
                self._tokens += tokens
            if self._on_pass is not None:
                self._on_pass(len(jobs), tokens)
            # Counted first: who has an answer finds it in the counts.
            for job, found in zip(jobs, outcomes, strict=True):
                if isinstance(found, Exception):
                    job.future.set_exception(found)
                else:
                    job.future.set_result(found)

    def _next(self) -> list[_Job]:
        """Wait for jobs and take as many as the budget holds; none when there is no more to do."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                jobs: list[_Job] = []
                tokens = 0
                while self._jobs:
                    job = self._jobs[0]
                    if jobs and tokens + job.tokens > self._token_budget:
                        break
                    self._jobs.popleft()
                    if job.future.set_running_or_notify_cancel():
                        jobs.append(job)
                        tokens += job.tokens
                if jobs or self._closing:
                    return jobs

    def _outcomes(self, jobs: Sequence[_Job]) -> list[list[Scored] | Exception]:
        """The scores of every job, or why it has none."""
        try:
            scored = iter(self._score([pair for job in jobs for pair in job.pairs]))
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self._outcomes([job])]
        return [_checked([next(scored) for _ in job.pairs]) for job in jobs]

    def _drop_cancelled(self) -> None:
        self._jobs = deque(job for job in self._jobs if not job.future.cancelled())

    def _seconds_of_waiting(self) -> int:
        rate = self._busy / self._tokens if self._tokens else 0.0  # seconds a token
        return max(1, math.ceil(rate * sum(job.tokens for job in self._jobs)))


def _checked(found: list[Scored]) -> list[Scored] | NonFiniteScore:
    for one in found:
        if not _is_finite(one):
            return NonFiniteScore(
                f"the model scored {one.text[:80]!r} with a value that is not finite: look for NaN "
                "or overflow in its weights, and load it in float32"
            )
    return found


def _is_finite(scored: Scored) -> bool:
    tokens = scored.tokens
    values = [scored.f, *tokens.f, *(step.f for step in scored.steps), *(tokens.reward or ())]
    return all(map(math.isfinite, values))
