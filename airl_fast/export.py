"""The policy and the reward of any checkpoint of a run, in a folder that the scorer reads."""

from __future__ import annotations

from pathlib import Path

from airl_fast.best import read_best
from airl_fast.checkpoint import checkpoint_steps, latest_checkpoint, load_checkpoint
from airl_fast.config import load_config


def export_run(folder: Path, checkpoint: str = "best", output: Path | None = None) -> Path:
    """Write policy/ and reward/ as they were at a checkpoint. The run may still be going on.

    Args:
        folder: of the run.
        checkpoint: ``best`` on validation, ``last``, or a number of finished steps.
        output: where to; by default a folder of the checkpoint's name in ``folder``, such as best.

    Returns:
        ``output``, which ``RewardScorer`` reads as it does a run's folder.

    Raises:
        ValueError: no run or no such checkpoint is there; those that are there are named.
        CheckpointError: the checkpoint is damaged.
        WriteError: ``output`` cannot be written to.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} holds no run (no config.yaml): give the run.output_dir of `airl-fast train`"
        )
    path = _find(folder, checkpoint)
    tensors, state = load_checkpoint(path)

    from airl_fast.trainer import Trainer  # slow, and a wrong argument should not wait for it

    trainer = Trainer(load_config(folder / "config.yaml"))
    trainer.restore(tensors, state)
    output = output or folder / (checkpoint if checkpoint in ("best", "last") else path.name)
    trainer.save(output)
    return output


def _find(folder: Path, checkpoint: str) -> Path:
    checkpoints = folder / "checkpoints"
    if checkpoint == "last":
        path = latest_checkpoint(checkpoints)
        if path is None:
            raise ValueError(f"{checkpoints} holds no checkpoint yet")
        return path
    if checkpoint == "best":
        step = read_best(folder).step
    elif checkpoint.isdecimal():
        step = int(checkpoint)
    else:
        raise ValueError(f"--checkpoint {checkpoint!r}: expected best, last or a number of steps")
    path = checkpoints / f"step-{step:06d}"
    if not path.exists():
        raise ValueError(
            f"{path} is not there; {checkpoints} holds those of steps "
            f"{checkpoint_steps(checkpoints)}"
        )
    return path
