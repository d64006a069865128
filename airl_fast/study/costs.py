"""How long a cell takes, before it has been run: completions sampled, passes over them."""

from __future__ import annotations

from airl_fast.config import RunConfig
from airl_fast.measuring import VALIDATION_SAMPLES
from airl_fast.schema import BUILT_IN
from airl_fast.study.cells import SFT, Cell, cell_config
from airl_fast.study.spec import Study

# Seconds a completion of `arithmetic`, one thread of an EPYC whose caches others used too, torch
# 2.13: sampled; a pass without gradients; a pass with them, and its share of the update.
SAMPLED, FORWARD, TRAINED = 1.8e-3, 0.65e-3, 2e-3


def estimate(study: Study, cell: Cell) -> float:
    """Seconds of a cell on one thread, with a model of the size of the built-in ones.

    For others a share of the work (``known``): what the first cells take makes it seconds.
    """
    config = _planned_config(study, cell)
    if cell.kind == "arm":
        training = config.total_steps * config.algorithm.sft_batch * TRAINED
        candidates = study.sft_checkpoints * (VALIDATION_SAMPLES + 1)
        return training + candidates * config.task.validation * SAMPLED
    if cell.kind == "start":
        return 3 * _measuring(study, config)
    warm_up = config.warmup_steps * _disc_step(config, sampled=config.discriminator.warmup_samples)
    own = config.run.steps * _policy_step(config) + warm_up
    points = config.total_steps // study.curve_every
    per_sample = SAMPLED + 4 * FORWARD
    curves = points * config.task.validation * config.run.eval_samples * per_sample
    return own + curves + _measuring(study, config) + _uses(study, config)


def known(study: Study, cells: list[Cell]) -> bool:
    """Whether estimates are seconds: every model of the cells is a built-in one."""
    configs = [_planned_config(study, cell) for cell in cells]
    models = {c.policy.model for c in configs} | {c.discriminator.model for c in configs}
    return models <= {*BUILT_IN, None}


def _planned_config(study: Study, cell: Cell) -> RunConfig:
    """The configuration before what it needs is done: the weights do not matter here."""
    if cell.kind != "variant":
        return cell_config(study, cell)
    variant = study.variants[cell.name]
    saved = ("discriminator.saved=a-reward",) if variant.reward_from else ()
    given = (*variant.overrides, *saved)
    return study.config(cell.seed, cell.folder, study.start_of(variant), *given)


def _disc_step(config: RunConfig, *, sampled: bool = True) -> float:
    """One step's own samples, if any, and the discriminator's updates on them."""
    disc = config.discriminator
    samples = config.shown_prompts * config.sampling.group_size if sampled else 0
    seen = samples * (1 + disc.replay_fraction) + config.shown_prompts + disc.perturbed_per_update
    passes = disc.updates_per_step * (TRAINED + (FORWARD if disc.pair_weight else 0.0))
    return samples * SAMPLED + seen * (FORWARD + passes)


def _policy_step(config: RunConfig) -> float:
    algorithm, sampling = config.algorithm, config.sampling
    samples = sampling.prompts_per_step * sampling.group_size
    policy = samples * (SAMPLED + 2 * FORWARD + algorithm.policy_updates * TRAINED)
    if algorithm.name != "airl" or algorithm.frozen_discriminator:
        return policy
    return policy + _disc_step(config) - config.shown_prompts * sampling.group_size * SAMPLED


def _measuring(study: Study, config: RunConfig) -> float:
    warm = sum(t > 0 for t in study.temperatures)
    validation = config.task.validation * (VALIDATION_SAMPLES * warm + 1)
    return (validation + config.task.test * (2 * study.samples + 1)) * SAMPLED


def _uses(study: Study, config: RunConfig) -> float:
    if config.algorithm.name != "airl":
        return 0.0
    return config.task.test * (study.rerank_samples + 1) * (SAMPLED + 2 * FORWARD)


def table(study: Study, cells: list[Cell]) -> list[tuple[str, int, float]]:
    """What is still to be run: by name, how many cells and the seconds of each."""
    rows: dict[str, tuple[int, float]] = {}
    for cell in cells:
        if not cell.done:
            name = f"{cell.name}, {SFT} arm {cell.arm + 1}" if cell.kind == "arm" else cell.name
            count, _ = rows.get(name, (0, 0.0))
            rows[name] = (count + 1, estimate(study, cell))
    return [(name, count, seconds) for name, (count, seconds) in rows.items()]


class Clock:
    """How much is left, corrected by how long the finished cells took against their estimates."""

    def __init__(self, study: Study, cells: list[Cell], workers: int) -> None:
        self.estimates = {cell.folder: estimate(study, cell) for cell in cells if not cell.done}
        self.workers = workers
        self._took, self._expected = 0.0, 0.0

    def finished(self, cell: Cell, seconds: float | None) -> None:
        """A cell is done after ``seconds``, or will not be."""
        expected = self.estimates.pop(cell.folder)
        if seconds is not None:
            self._took += seconds
            self._expected += expected

    def left(self) -> float:
        """Seconds until all are done, if the workers are never idle."""
        ratio = self._took / self._expected if self._expected else 1.0
        return ratio * sum(self.estimates.values()) / self.workers


def in_words(seconds: float) -> str:
    """As 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
