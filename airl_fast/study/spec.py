"""What a study is: seeds, warm starts, variants, comparisons; read from YAML and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from airl_fast.config import ConfigError, RunConfig, load_config
from airl_fast.config import load_yaml as parse_yaml
from airl_fast.parsing import shown, shown_names
from airl_fast.section import Float, Int, refuse_if, section

# Set by the study itself, seed by seed and cell by cell
OWN_KEYS = ("run.output_dir", "run.seed", "run.eval_every", "run.eval_kl", "run.resume",
            "task.seed", "algorithm.sft_warmup", "discriminator.saved")  # fmt: skip
BEST_SFT = "best SFT"
Overrides = tuple[str, ...]
Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^/\\|`:]+$")]


@section
class Start:
    """A task and its demonstrations, and the base model that is warm-started on them by SFT."""

    overrides: Overrides = Field(default=(), description="section.key=value, for all that follows")


@section
class Variant:
    """One way to improve a policy from its warm start; compared with the others."""

    start: str | None = Field(default=None, description="which start; null: the first")
    init: Literal["greedy", "sampled", "base"] = Field(
        default="greedy",
        description="the SFT checkpoint that decodes best on validation problems, the one that "
        "samples best at temperature 1, or the model before SFT",
    )
    reward_from: str | None = Field(
        default=None, description="the variant whose learned reward f starts from (same seed)"
    )
    overrides: Overrides = Field(default=(), description="section.key=value")


@section
class Study:
    """A grid of seeds by variants."""

    recipe: str = Field(min_length=1, description="recipe or YAML file that all runs vary")
    overrides: Overrides = Field(default=(), description="section.key=value, for every run")
    seeds: tuple[Int, ...] = Field(min_length=1, description="of data, samples and weights")
    starts: dict[Name, Start] = Field(min_length=1, description="by name")
    variants: dict[Name, Variant] = Field(min_length=1, description="by name")
    comparisons: tuple[tuple[str, str], ...] = Field(
        default=(), description=f"pairs of variants; the second may be SFT or {BEST_SFT!r}"
    )
    plots: dict[Name, tuple[str, ...]] = Field(
        default_factory=dict, description="variants whose curves share a plot, at most six"
    )
    sft_arms: tuple[tuple[Float, Int], ...] = Field(
        default=((2e-4, 240), (1e-3, 700)), min_length=1, description="learning rate and steps"
    )
    sft_checkpoints: Int = Field(default=6, ge=1, description="of each arm, to choose from")
    temperatures: tuple[Float, ...] = Field(
        default=(1.0, 0.7, 0.5, 0.3, 0.0), description="to choose from; 0: greedy"
    )
    samples: Int = Field(default=8, ge=1, description="of each test problem, for accuracy")
    rerank_samples: Int = Field(default=16, ge=2, description="to pick one of")
    curve_every: Int = Field(default=10, ge=1, description="steps between points of the curves")
    checkpoint: Literal["last", "best"] = Field(
        default="last", description="measured: the last policy, or the best on validation problems"
    )

    @model_validator(mode="after")
    def _check(self) -> Study:
        known = [*self.variants, "SFT", BEST_SFT]
        missing = [name for pair in self.comparisons for name in pair if name not in known]
        plotted = [name for names in self.plots.values() for name in names]
        unknown = [name for name in plotted if name not in self.variants]
        crowded = [title for title, names in self.plots.items() if not 1 <= len(names) <= 6]
        folders = [folder_name(name) for name in (*self.starts, *self.variants)]
        refuse_if(
            (len(set(self.seeds)) < len(self.seeds), f"seeds={list(self.seeds)}: one is twice"),
            (min(self.seeds) < 0, f"seeds={list(self.seeds)}: expected 0 or more"),
            (
                bool(missing),
                f"comparisons: no variant is called {shown_names(missing)}; there are "
                f"{shown_names(known)}",
            ),
            (
                bool(unknown),
                f"plots: no variant is called {shown_names(unknown)}; there are "
                f"{shown_names(self.variants)}",
            ),
            (bool(crowded), f"plots: {shown_names(crowded)}: expected one to six variants each"),
            (
                len({*folders, ""}) <= len(folders),
                f"starts and variants become the folders {shown_names(folders)}: two are the same, "
                "or one has no letter; rename it",
            ),
            (
                1.0 not in self.temperatures or min(self.temperatures) < 0,
                f"temperatures={list(self.temperatures)}: expected 1 among them, none below 0",
            ),
        )
        for name, variant in self.variants.items():
            self._check_variant(name, variant)
        return self

    def _check_variant(self, name: str, variant: Variant) -> None:
        earlier = list(self.variants)[: list(self.variants).index(name)]
        refuse_if(
            (
                variant.start is not None and variant.start not in self.starts,
                f"variants.{name}.start: no start is called {shown(variant.start)}; there are "
                f"{shown_names(self.starts)}",
            ),
            (
                variant.reward_from is not None and variant.reward_from not in earlier,
                f"variants.{name}.reward_from={shown(variant.reward_from)}: expected one of the "
                f"variants before it: {shown_names(earlier)}",
            ),
        )

    def start_of(self, variant: Variant) -> str:
        """The name of a variant's start."""
        return variant.start or next(iter(self.starts))

    def config(self, seed: int, folder: Path, start: str, *overrides: str) -> RunConfig:
        """The configuration of one run of a seed; its own overrides come last.

        Raises:
            ConfigError: they make none.
        """
        own = (
            f"run.output_dir={folder}",
            f"run.seed={seed}",
            f"task.seed={seed}",
            f"run.eval_every={self.curve_every}",
            "run.eval_kl=true",
            "algorithm.sft_warmup=0",
        )
        given = (*self.overrides, *self.starts[start].overrides)
        return load_config(self.recipe, ["run.threads=1", *given, *own, *overrides])


def folder_name(name: str) -> str:
    """A name as that of a folder: letters and digits, everything else a hyphen."""
    plain = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(part for part in plain.split("-") if part)


def studies() -> list[str]:
    """Return the names of the studies that ship with the package."""
    folder = resources.files("airl_fast.study") / "files"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def study_text(source: str) -> str:
    """The text of a study's file, by name or path.

    Raises:
        ConfigError: there is none.
    """
    if source in studies():
        return (resources.files("airl_fast.study") / "files" / f"{source}.yaml").read_text("utf-8")
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{shown(source)} is no file and no study ({', '.join(studies())}): give the path of a "
            "YAML file, or one of these names"
        )
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{source}: cannot be read: {error}; check its rights, and save it as UTF-8"
        ) from None


def description(text: str) -> str:
    """The comment at the top of a study's file."""
    lines = text.splitlines()
    head = lines[: next((i for i, line in enumerate(lines) if line[:1] != "#"), len(lines))]
    return " ".join(line.lstrip("#").strip() for line in head).strip()


def load_study(
    source: str, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Study:
    """Read a study and check it, with the configuration of every run in it.

    Args:
        source: the name of one that ships with the package (``studies``), or a YAML file.
        changes: fields to replace, such as ``seeds``.
        overrides: ``section.key=value`` for every run, after those of the file.

    Raises:
        ConfigError: it is none; what is wrong is named with its place.
    """
    try:
        tree = parse_yaml(study_text(source))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{source}: expected `key: value` lines, received {shown(tree)}")
    tree = {
        key: {k: v if v is not None else {} for k, v in value.items()}
        if key in ("starts", "variants") and isinstance(value, dict)
        else value
        for key, value in tree.items()
    }
    try:
        study = Study(**{**tree, **(changes or {})})
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None
    study = replace(study, overrides=(*study.overrides, *overrides))
    _check_runs(source, study)
    return study


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, its place, and how many more there are."""
    first, *others = error.errors(include_url=False)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        place = ".".join(shown(part).strip("'") for part in first["loc"])
        message = f"{place}: {message}, received {shown(first['input'])}"
    return message + (f" (and {len(others)} more)" if others else "")


def _check_runs(source: str, study: Study) -> None:
    """Refuse what would fail hours later: a key that the study sets, a run that cannot be."""
    places = {"overrides": study.overrides}
    places |= {f"starts.{name}": start.overrides for name, start in study.starts.items()}
    places |= {f"variants.{name}": variant.overrides for name, variant in study.variants.items()}
    for place, overrides in places.items():
        for override in overrides:
            key = override.partition("=")[0]
            if key in OWN_KEYS:
                raise ConfigError(f"{source}: {place}: {key} is set by the study; remove it")
            if key == "policy.model" and place.startswith("variants."):
                raise ConfigError(
                    f"{source}: {place}: policy.model is where the start's SFT ended; set it in "
                    "starts, and another one with another start"
                )
    for name, variant in study.variants.items():
        saved = ("discriminator.saved=a-reward",) if variant.reward_from else ()
        try:
            config = study.config(
                study.seeds[0], Path("run"), study.start_of(variant), *variant.overrides, *saved
            )
        except ConfigError as error:
            raise ConfigError(f"{source}: variants.{name}: {error}") from None
        source_config = study.variants.get(variant.reward_from or "")
        if config.discriminator.trunk == "policy" and config.algorithm.name == "airl":
            raise ConfigError(
                f"{source}: variants.{name}: discriminator.trunk=policy reads the hidden states of "
                "one policy, and a study scores those of others; set discriminator.trunk=own"
            )
        if source_config is not None and "algorithm.name=grpo" in source_config.overrides:
            raise ConfigError(
                f"{source}: variants.{name}: reward_from={variant.reward_from!r}, which learns "
                "no reward; give a variant of algorithm.name=airl"
            )
    for name in study.starts:
        try:
            study.config(study.seeds[0], Path("run"), name, "algorithm.name=sft")
        except ConfigError as error:
            raise ConfigError(
                f"{source}: the SFT of starts.{name} has the overrides of the study and the start: "
                f"{error}; what only variants take belongs in theirs"
            ) from None
