"""What is fuzzed: a function of bytes for everything that reads what others wrote.

The first byte chooses the variant (a format, a file), the rest is the content. A target returns
where the input was read or refused as documented; whatever else it raises is a finding. A refusal
has to be one that is documented, say something, and stay short.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from airl_fast.calibration import Calibration
from airl_fast.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from airl_fast.config import ConfigError, TaskConfig, load_config
from airl_fast.readers import FORMATS, Reading
from airl_fast.report.run import report_run
from airl_fast.reward_folder import read_trained
from airl_fast.run_folder import RunFolder
from airl_fast.score_files import locate_file, rerank_file, score_file
from airl_fast.study.spec import load_study
from airl_fast.tasks import load_task
from fuzz import seeds

LONGEST = 5000  # characters of a refusal


class Finding(AssertionError):  # noqa: N818
    """A target did what it must not do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        name: on the command line.
        seeds: JSON values that it reads, one list for each variant.
        run: takes the variant, the content and a folder that it may write to.
    """

    name: str
    seeds: Sequence[Sequence[Any]]
    run: Callable[[int, bytes, Path], None]

    def __call__(self, data: bytes, folder: Path) -> None:
        """Run one input.

        Raises:
            Exception: a finding.
        """
        if data:
            self.run(data[0] % len(self.seeds), data[1:], folder)


def refused(error: Exception) -> None:
    """Check a documented refusal.

    Raises:
        Finding: it says nothing, or too much.
    """
    words = str(error)
    if not 8 <= len(words) <= LONGEST:
        raise Finding(f"a refusal of {len(words)} characters: {words[:200]!r}") from error


def _readers(variant: int, data: bytes, folder: Path) -> None:
    """Files of judged traces: three formats, a JSON array, and gzip, whole and spoilt."""
    kinds = (*((f"a.{name}", name) for name in FORMATS), ("b.json", "processbench"))
    if variant < len(kinds):
        name, kind = kinds[variant]
    else:
        name, kind = "c.jsonl.gz", "jsonl"
        if data[:2] != b"\x1f\x8b":
            packed = zlib.compressobj(1, wbits=31)
            data = packed.compress(data) + packed.flush()
            if len(data) % 3 == 0:  # a byte that is not as it was written
                place = len(data) // 2
                data = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
    path = folder / name
    path.write_bytes(data)
    try:
        for _ in Reading(path, kind):  # type: ignore[arg-type]
            pass
    except ValueError as error:
        refused(error)


class _Enough(Exception):  # noqa: N818
    """The rows were taken; nothing is scored here."""


def _no_scorer() -> Any:
    raise _Enough


def _files(variant: int, data: bytes, folder: Path) -> None:
    """What ``airl-fast score``, ``rerank`` and ``locate`` check before a model is loaded."""
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    try:
        (score_file, rerank_file, locate_file)[variant](_no_scorer, path, folder / "out.jsonl")
    except ValueError as error:
        refused(error)
    except _Enough:
        return


def _tasks(variant: int, data: bytes, folder: Path) -> None:
    """The tasks that read files."""
    name = ("jsonl", "gsm8k", "medreason", "mmlu_pro")[variant]
    path = folder / "data.jsonl"
    path.write_bytes(data)
    try:
        load_task(TaskConfig(name=name, path=str(path), validation=1, test=1, unlabelled=1))
    except ValueError as error:
        refused(error)


def _calibration(_: int, data: bytes, folder: Path) -> None:
    path = folder / "calibration.json"
    path.write_bytes(data)
    try:
        found = Calibration.load(path)
    except ValueError as error:
        refused(error)
        return
    step, confidence, values = found.decider.decide([1.0, -2.0, 0.5], [3, 1, 2])
    if not 0 <= confidence <= 1 or step not in (None, 0, 1, 2) or len(values) != 3:
        raise Finding(f"decided {step!r} with a confidence of {confidence!r}")
    found.summary()


def _trained(_: int, data: bytes, folder: Path) -> None:
    """``airl_fast.json`` beside saved weights."""
    (folder / "airl_fast.json").write_bytes(data)
    try:
        found = read_trained(folder)
    except ValueError as error:
        refused(error)
        return
    if not math.isfinite(found.temperature) or found.interval < 1:
        raise Finding(f"taken: {found}")


def _checkpoint(variant: int, data: bytes, folder: Path) -> None:
    """A manifest; a state, and tensors, that fit their manifest; a state that a run goes on from.

    A manifest is no signature: whoever can write a state can write its digest.
    """
    run = folder / "run"
    path = run / "checkpoints" / "step-000002"
    path.mkdir(parents=True, exist_ok=True)
    files = {"state.json": seeds.STATE, "tensors.safetensors": seeds.TENSORS}
    if variant in (1, 3):
        files["state.json"] = data
    elif variant == 2:
        files["tensors.safetensors"] = data
    named = {}
    for name, content in files.items():
        (path / name).write_bytes(content)
        named[name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    manifest = json.dumps({"format": 1, "step": 2, "files": named}).encode()
    (path / "manifest.json").write_bytes(data if variant == 0 else manifest)
    try:
        if variant == 3:
            (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
            RunFolder(load_config("arithmetic", [f"run.output_dir={run}"])).open()
        else:
            found = latest_checkpoint(path.parent)
            if found is not None:
                load_checkpoint(found)
    except CheckpointError as error:
        refused(error)
    except ValueError as error:  # documented of RunFolder.open alone
        if variant != 3:
            raise
        refused(error)


def _metrics(variant: int, data: bytes, folder: Path) -> None:
    """metrics.jsonl: what a run goes on from, and what a report shows."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_bytes(data)
    try:
        if variant == 0:
            RunFolder(load_config("arithmetic", [f"run.output_dir={run}"])).history()
        else:
            report_run(folder / "report.html", folder=run)
            _page(folder / "report.html")
    except ValueError as error:
        refused(error)


def _report(variant: int, data: bytes, folder: Path) -> None:
    """Scored traces, what lies beside them, an evaluation, and a run's configuration."""
    run, page = folder / "run", folder / "report.html"
    run.mkdir(exist_ok=True)
    scores, other = folder / "scores.jsonl", folder / "other.jsonl"
    scores.write_bytes(json.dumps(seeds.SCORED).encode())
    other.write_bytes(data)
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "policy", "seconds": 1.0}\n')
    (run / "config.yaml").write_text("run: {seed: 1}\n")
    try:
        if variant == 0:
            report_run(page, scores=other)
        elif variant == 1:
            report_run(page, scores=scores, traces=other)
        elif variant == 2:
            report_run(page, scores=scores, located=other)
        elif variant == 3:
            report_run(page, evaluation=other)
        else:
            (run / "config.yaml").write_bytes(data)
            report_run(page, folder=run)
        _page(page)
    except ValueError as error:
        refused(error)


def _page(path: Path) -> None:
    """Nothing that was read may be markup in the page."""
    text = path.read_text("utf-8")
    scripts = text.count("<script")
    blocks = text.count('<script type="application/json">')
    if scripts != text.count("</script>") or scripts - blocks > 1 or "<script>alert" in text:
        raise Finding(f"{scripts} script elements, of which {blocks} are data")
    path.unlink()


def _config(variant: int, data: bytes, folder: Path) -> None:
    """A configuration file, an override of the command line, and a study."""
    path = folder / "run.yaml"
    try:
        if variant == 0:
            path.write_bytes(data)
            load_config(path)
        elif variant == 2:
            path.write_bytes(data)
            load_study(str(path))
        else:
            load_config("arithmetic", [data.decode("utf-8", "replace")])
    except ConfigError as error:
        refused(error)


def _server(variant: int, data: bytes, folder: Path) -> None:
    from fuzz.server import ask

    ask(variant, data)


TARGETS = {
    target.name: target
    for target in (
        Target(name="readers", seeds=seeds.READERS, run=_readers),
        Target(name="files", seeds=seeds.FILES, run=_files),
        Target(name="tasks", seeds=seeds.TASKS, run=_tasks),
        Target(name="calibration", seeds=[[seeds.CALIBRATION]], run=_calibration),
        Target(name="trained", seeds=[[seeds.TRAINED]], run=_trained),
        Target(name="checkpoint", seeds=seeds.CHECKPOINT, run=_checkpoint),
        Target(name="metrics", seeds=seeds.METRICS, run=_metrics),
        Target(name="report", seeds=seeds.REPORT, run=_report),
        Target(name="config", seeds=seeds.CONFIG, run=_config),
        Target(name="server", seeds=seeds.SERVER, run=_server),
    )
}
