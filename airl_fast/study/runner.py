"""Running a study: cells in worker processes, until all are done or cannot be."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from airl_fast import jobs
from airl_fast.durable import make_folder, write_text
from airl_fast.runs_progress import RunsProgress
from airl_fast.study import costs
from airl_fast.study.cells import Cell, cell_config, plan, run_cell, waiting_for
from airl_fast.study.spec import Study, description, load_study, study_text

_FAILED = "error.txt"  # in a cell's folder, until it is done
_SHOWN = ("comparisons", "plots")  # what they say is made anew each time


def run_study(
    source: str,
    output_dir: Path,
    *,
    workers: int = 1,
    page: Path | None = None,
    overrides: Sequence[str] = (),
    **changes: Any,
) -> dict[str, str]:
    """Run a study, or what is left of it, and write results.json, results.md and report.html.

    Args:
        source: name or YAML file of the study.
        output_dir: a new or empty folder, or one of the same study; it may have been given more
            seeds, starts or variants since, and other comparisons and plots.
        workers: processes, each on one thread.
        page: where the Markdown page goes too, with its plots in a folder of its name beside it.
        overrides: ``section.key=value`` after those of the file, before its starts' and variants'.
        **changes: fields of the study to replace, such as ``seeds``.

    Returns:
        The cells that failed, and why; they are run again the next time.

    Raises:
        ValueError: the study is wrong, or the folder holds something else.
        jobs.StoppedError: SIGTERM or Ctrl-C; every run has saved its step.
    """
    from airl_fast.study.page import write_page
    from airl_fast.study.results import collect

    study = load_study(source, changes, overrides)
    if workers < 1:
        raise ValueError(f"expected 1 worker process or more, received {workers}")
    if page is not None and find_spec("matplotlib") is None:
        raise ValueError('the plots of a page need matplotlib: pip install "airl-fast[report]"')
    jobs.open_folder(output_dir, asdict(study), "study", _bound)
    cells = plan(study, output_dir)
    _say_costs(study, cells, workers)
    failed = _run_cells(study, cells, workers)
    results = collect(study, cells)
    name = Path(source).stem
    write_page(output_dir, name, description(study_text(source)), study, results, failed, page)
    return failed


def _bound(old: jobs.Settings, new: jobs.Settings) -> tuple[jobs.Settings, jobs.Settings]:
    """What finished cells depend on: no comparison, no plot, nothing that was added since."""
    kept, now = ({k: v for k, v in x.items() if k not in _SHOWN} for x in (old, new))
    for name in ("starts", "variants"):
        now[name] = {k: v for k, v in now[name].items() if k in kept.get(name, {})}
    if set(kept.get("seeds", ())) <= set(now["seeds"]):
        now["seeds"] = kept.get("seeds")
    for x, settings in ((kept, old), (now, new)):
        x["first start"] = next(iter(settings.get("starts", {})), None)  # where variants start
    return kept, now


def _say_costs(study: Study, cells: list[Cell], workers: int) -> None:
    left = costs.table(study, cells)
    total = sum(count * seconds for _, count, seconds in left)
    done = sum(cell.done for cell in cells)
    print(f"{len(cells)} cells, {done} of them done.", flush=True)
    if not left:
        return
    if not costs.known(study, cells):
        print("How long the rest takes is known once one is done. The share of each, about:")
        for name, count, seconds in left:
            print(f"  {count} x {seconds / total:>6.1%}  {name}", flush=True)
        return
    print("Estimates for one thread each:")
    for name, count, seconds in left:
        print(f"  {count} x {costs.in_words(seconds):>7}  {name}")
    print(f"About {costs.in_words(total / workers)} with {workers} at a time.", flush=True)


def _run_cells(study: Study, cells: list[Cell], workers: int) -> dict[str, str]:
    """Run what is not done; a cell that fails takes along only those that need it."""
    clock = costs.Clock(study, cells, workers)
    left = [cell for cell in cells if not cell.done]
    failed: dict[str, str] = {}
    running: dict[Future[Any], Cell] = {}
    with jobs.pool(workers) as pool, RunsProgress(hide_done=True) as bars:
        while left or running:
            _start_ready(study, cells, left, running, workers, pool, bars)
            if not running:  # the rest needs what failed
                for cell in left:
                    names = ", ".join(other.title for other in waiting_for(cell, cells))
                    failed[cell.title] = f"not run: it needs {names}"
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                error = _outcome(cell, future)
                if error is not None:
                    failed[cell.title] = error
                clock.finished(cell, None if error else future.result()["seconds"])
                what = "failed" if error else "done"
                finished = sum(other.done for other in cells)
                bars.say(
                    f"{cell.title}: {what}; {finished} of {len(cells)} cells, about "
                    f"{costs.in_words(clock.left())} left"
                )
    return failed


def _start_ready(
    study: Study,
    cells: list[Cell],
    left: list[Cell],
    running: dict[Future[Any], Cell],
    workers: int,
    pool: ProcessPoolExecutor,
    bars: RunsProgress,
) -> None:
    """Submit cells whose needs are met, as many as there are workers."""
    for cell in list(left):
        if len(running) == workers:
            return
        if waiting_for(cell, cells):
            continue
        left.remove(cell)
        future = pool.submit(run_cell, study, cell)
        if cell.kind == "start":
            bars.wait(cell.title, future)
        else:
            bars.follow(cell.title, cell_config(study, cell), future)
        running[future] = cell


def _outcome(cell: Cell, future: Future[Any]) -> str | None:
    """What went wrong, kept in the cell's folder; None where nothing did.

    Raises:
        jobs.StoppedError: asked to stop.
        BrokenProcessPool: a worker died; which cell's it was is not known.
    """
    error = future.exception()
    if error is None:
        (cell.folder / _FAILED).unlink(missing_ok=True)
        return None
    if isinstance(error, (jobs.StoppedError, BrokenProcessPool)):
        raise error
    make_folder(cell.folder)
    write_text(cell.folder / _FAILED, "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error} ({cell.folder / _FAILED})"
