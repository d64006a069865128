"""The rows of the commands that work on runs: export, study."""

from __future__ import annotations

from typing import Any

import torch

from airl_fast.checkpoint import save_checkpoint
from airl_fast.config import load_config, save_config
from tests.robustness.commands import PLAIN
from tests.robustness.table import Cell, CommandRefused, Entry

CELLS: list[Cell] = []
_STUDY = "recipe: arithmetic\nseeds: [0]\nstarts: {a: }\nvariants: {b: }\n"


def run(t: Any, spoilt: str | None = None) -> Any:
    """A folder as a run of one step leaves it, with weights of no model."""
    folder = t.folder()
    save_config(load_config("arithmetic"), folder / "config.yaml")
    made = save_checkpoint(folder / "checkpoints", 1, {"a": torch.ones(1)}, {"step": 1}, keep=1)
    if spoilt is not None:
        (made / spoilt).write_text("{")
    return folder


_e = Entry(
    "airl-fast export",
    CELLS,
    shape=PLAIN,
    dtype=PLAIN,
    offsets=PLAIN,
    non_finite=PLAIN,
    device="as Trainer",
)
_e.refuses(
    "range",
    "a step without a checkpoint",
    lambda t: t.command("export", run(t), "--checkpoint", 7),
    "step-000007 is not there",
    "holds those of steps [1]",
    CommandRefused,
)
_e.refuses(
    "negative",
    "--checkpoint=-1",
    lambda t: t.command("export", run(t), "--checkpoint=-1"),
    "'-1'",
    "expected best, last or a number of steps",
    CommandRefused,
)
_e.refuses(
    "empty",
    "a run that was never evaluated",
    lambda t: t.command("export", run(t)),
    "best.json",
    "run.eval_every",
    CommandRefused,
)
_e.refuses(
    "option",
    "--checkpoint first",
    lambda t: t.command("export", run(t), "--checkpoint", "first"),
    "'first'",
    "expected best, last or a number of steps",
    CommandRefused,
)
_e.refuses(
    "file",
    "a folder without a run",
    lambda t: t.command("export", t.folder()),
    "no config.yaml",
    "give the run.output_dir of `airl-fast train`",
    CommandRefused,
)
_e.refuses(
    "file",
    "a damaged checkpoint",
    lambda t: t.command("export", run(t, spoilt="state.json"), "--checkpoint", 1),
    "state.json has 1 bytes",
    "take an earlier checkpoint",
    CommandRefused,
)
_e.refuses(
    "model",
    "a checkpoint of other models",
    lambda t: t.command("export", run(t), "--checkpoint", 1),
    "found nothing",
    "resume with the models that the run was started with",
    CommandRefused,
)

_e = Entry(
    "airl-fast study",
    CELLS,
    shape=PLAIN,
    device="as Trainer",
    offsets=PLAIN,
    model="as Trainer",
    dtype="as load_config",
    non_finite="as load_config",
)
_e.refuses(
    "option",
    "a field that does not exist",
    lambda t: t.command("study", t.file(_STUDY + "seed: 0", "x.yaml"), "--output-dir", t.folder()),
    "seed: ",
    "Unexpected keyword argument",
    CommandRefused,
)
_e.refuses(
    "option",
    "an override of what the study sets",
    lambda t: t.command("study", t.file(_STUDY + "overrides: [run.seed=1]", "x.yaml")),
    "run.seed",
    "is set by the study; remove it",
    CommandRefused,
)
_e.refuses(
    "empty",
    "no seeds",
    lambda t: t.command("study", t.file(_STUDY.replace("[0]", "[]"), "x.yaml")),
    "seeds",
    "at least 1 item",
    CommandRefused,
)
_e.refuses(
    "range",
    "--jobs 0",
    lambda t: t.command("study", t.file(_STUDY, "x.yaml"), "--jobs", 0),
    "received 0",
    "expected 1 worker process or more",
    CommandRefused,
)
_e.refuses(
    "negative",
    "--seeds -1",
    lambda t: t.command("study", t.file(_STUDY, "x.yaml"), "--seeds", -1),
    "[-1]",
    "expected 0 or more",
    CommandRefused,
)
_e.refuses(
    "file",
    "a study that does not exist",
    lambda t: t.command("study", "nothing"),
    "'nothing'",
    "YAML file, or one of these names",
    CommandRefused,
)
_e.refuses(
    "file",
    "a folder that holds something else",
    lambda t: t.command("study", t.file(_STUDY, "x.yaml"), "--output-dir", t.rows(1).parent),
    "is not empty",
    "choose another --output-dir",
    CommandRefused,
)
