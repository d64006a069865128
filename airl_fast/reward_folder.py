"""What lies in a reward's folder beside its weights: what it was trained for, its calibration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from airl_fast.calibration import Calibration
from airl_fast.metadata import METADATA, read_metadata
from airl_fast.parsing import shown
from airl_fast.scores import Trained

CALIBRATION = "calibration.json"
_HEAD = "discriminator_head.safetensors"
_TRAINED = TypeAdapter(Trained)


def reward_folder(directory: Path) -> Path:
    """Return the folder of the reward: ``directory``, or ``directory``/reward.

    Raises:
        ValueError: there is none, with what is there instead.
    """
    if not directory.is_dir():
        raise ValueError(
            f"{directory}: no such folder; give the run.output_dir of `airl-fast train`, or the "
            "reward folder in it"
        )
    if (directory / METADATA).is_file():
        return directory
    if (directory / "reward" / METADATA).is_file():
        return directory / "reward"
    if (directory / "policy" / METADATA).is_file():
        raise ValueError(
            f"{directory} holds a policy and no reward: a run of algorithm.name=sft or grpo learns "
            "none; give the folder of a run of airl"
        )
    if (directory / "checkpoints").is_dir():
        raise ValueError(
            f"{directory} holds a run that has not ended: its reward is written at the end; give "
            "its `airl-fast train` command again, and it goes on from its last checkpoint"
        )
    raise ValueError(
        f"{directory} holds no trained reward: expected the run.output_dir of `airl-fast train` "
        "(with reward/ and policy/ in it), or a reward folder"
    )


def read_trained(folder: Path) -> Trained:
    """Read what the reward in a folder was trained for.

    Raises:
        ValueError: it does not say, or says what cannot be.
    """
    training = read_metadata(folder, "discriminator").get("training")
    if not isinstance(training, dict):
        raise ValueError(
            f"{folder / METADATA}: 'training' is {shown(training)}, expected an object"
        )
    names = [field.name for field in fields(Trained)]
    missing = [name for name in names if name not in training]
    if missing:
        raise ValueError(
            f"{folder / METADATA} does not say how the reward was trained: its 'training' lacks "
            f"{', '.join(missing)}; save with Discriminator.save(..., training={{...}})"
        )
    values = {name: training[name] for name in names}
    try:
        return _TRAINED.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, why = ".".join(map(str, first["loc"])), first["msg"]
        raise ValueError(
            f"{folder / METADATA}: training.{where}: {why}, received {shown(first['input'])}; "
            "restore it from a copy"
        ) from None


def read_calibration(folder: Path) -> Calibration | None:
    """Read the calibration of the reward in a folder; None where there is none.

    Raises:
        ValueError: a file that is none, or one that was made for a reward with another head.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    found = Calibration.load(path)
    if found.weights != weights_digest(folder):
        raise ValueError(
            f"{path} was made for other weights than those beside it: run `airl-fast calibrate` "
            "again, or remove it"
        )
    return found


def weights_digest(folder: Path) -> str:
    """A digest of the reward's head, which every training changes."""
    return hashlib.sha256((folder / _HEAD).read_bytes()).hexdigest()
