"""The rows of configurations and the trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from airl_fast import RunConfig
from airl_fast.config import ConfigError, load_config, save_config
from airl_fast.tasks import load_task
from airl_fast.trainer import Trainer
from tests.robustness.table import Cell, Entry
from tests.tiny_run import SMALL

CELLS: list[Cell] = []
NO_TENSOR = "takes no tensors"

_e = Entry(
    "RunConfig",
    CELLS,
    shape=NO_TENSOR,
    device=NO_TENSOR,
    offsets=NO_TENSOR,
    file="reads none; load_config does",
)


def built(**sections: Any) -> Any:
    def call(_: Any) -> RunConfig:
        base = load_config("arithmetic")
        given = {
            name: getattr(base, name)
            for name in ("task", "run", "algorithm", "policy", "discriminator", "sampling")
        }
        for name, fields in sections.items():
            given[name] = replace(given[name], **fields)
        return RunConfig(**given)

    return call


_e.refuses("dtype", "run.steps of a text", built(run={"steps": "many"}), "'many'", "integer")
_e.refuses(
    "range",
    "task.expert_error=1.5",
    built(task={"expert_error": 1.5}),
    "1.5",
    "less than or equal to 1",
)
_e.refuses("negative", "run.steps=-1", built(run={"steps": -1}), "-1", "greater than or equal to")
_e.refuses(
    "non-finite",
    "a learning rate of NaN",
    built(policy={"learning_rate": float("nan")}),
    "nan",
    "greater than 0",
)
_e.refuses("empty", "no sections", lambda _: RunConfig(), "required", "task")
_e.refuses(
    "option",
    "a field that does not exist",
    lambda _: RunConfig(runs=1),
    "runs",
    "Unexpected keyword argument",
)
_e.refuses(
    "option",
    "adapters shared with a policy without one",
    built(discriminator={"trunk": "shared", "lora_rank": 4}),
    "discriminator.trunk=shared",
    "set policy.lora_rank to 1 or more",
)
_e.refuses(
    "model",
    "arithmetic's model for another task",
    built(task={"name": "gsm8k", "expert_error": 0.3}),
    "knows the characters of arithmetic only",
    "set policy.model to a language model",
)


def loaded(*overrides: str, source: Any = "arithmetic") -> Any:
    return lambda t: load_config(source(t) if callable(source) else source, overrides)


_e = Entry("config.load_config", CELLS, shape=NO_TENSOR, device=NO_TENSOR, offsets=NO_TENSOR)
_e.refuses(
    "dtype", "run.steps=many", loaded("run.steps=many"), "received 'many'", "run.steps", ConfigError
)
_e.refuses(
    "dtype",
    "run.steps=true",
    loaded("run.steps=true"),
    "received True",
    "expected a number",
    ConfigError,
)
_e.refuses(
    "range",
    "task.expert_error=1.5",
    loaded("task.expert_error=1.5"),
    "received 1.5",
    "less than or equal to 1",
    ConfigError,
)
_e.refuses(
    "negative",
    "run.steps=-1",
    loaded("run.steps=-1"),
    "received -1",
    "greater than or equal to",
    ConfigError,
)
_e.refuses(
    "non-finite",
    "policy.learning_rate=.nan",
    loaded("policy.learning_rate=.nan"),
    "received nan",
    "greater than 0",
    ConfigError,
)
_e.refuses(
    "empty",
    "an empty file",
    loaded(source=lambda t: t.file("", "a.yaml")),
    "received None",
    "expected sections such as `run:`",
    ConfigError,
)
_e.refuses(
    "empty",
    "an override without a value",
    loaded("run.steps="),
    "'run.steps='",
    "write section.key=value",
    ConfigError,
)
_e.refuses(
    "option",
    "a key that is nearly one",
    loaded("run.step=3"),
    "run.step: no such key",
    "did you mean run.steps?",
    ConfigError,
)
_e.refuses(
    "option",
    "a repeated key",
    loaded(source=lambda t: t.file("run:\n  steps: 1\n  steps: 2\n", "a.yaml")),
    "'steps' is given twice",
    "line",
    ConfigError,
)
_e.refuses(
    "file",
    "a file that does not exist",
    loaded(source="nowhere.yaml"),
    "nowhere.yaml: no such file",
    "give a YAML file or a recipe",
    ConfigError,
)
_e.refuses(
    "file",
    "a file that is no YAML",
    loaded(source=lambda t: t.file("a: [", "a.yaml")),
    "not readable as YAML",
    "line",
    ConfigError,
)
_e.refuses(
    "file",
    "a file that is no text",
    loaded(source=lambda t: t.file(b"\xff\xfe", "a.yaml")),
    "cannot be read",
    "save it as UTF-8",
    ConfigError,
)
_e.refuses(
    "model",
    "a recipe that does not exist",
    loaded(source="arithmetics"),
    "'arithmetics' is no file and no recipe",
    "did you mean arithmetic?",
    ConfigError,
)


def run(*overrides: str, prepare: Any = None) -> Any:
    def call(t: Any) -> None:
        folder = t.folder()
        config = load_config("arithmetic", [*SMALL, f"run.output_dir={folder}", *overrides])
        if prepare is not None:
            prepare(folder, config)
        trainer = Trainer(config, task=_task(config), policy=_policy(t))
        trainer.train()

    return call


_made: dict[str, Any] = {}


def _task(config: RunConfig) -> Any:
    if "task" not in _made:
        _made["task"] = load_task(config.task)
    return _made["task"]


def _policy(t: Any) -> Any:
    if "policy" not in _made:
        from airl_fast import Policy

        _made["policy"] = Policy.from_pretrained("arithmetic-base")
    return _made["policy"]


_e = Entry(
    "Trainer",
    CELLS,
    shape="takes a RunConfig",
    offsets="takes a RunConfig",
    range="RunConfig refuses it",
    negative="RunConfig refuses it",
    non_finite="the optimiser refuses a gradient that is not finite",
)
_e.refuses(
    "dtype",
    "a dict for the configuration",
    lambda _: Trainer({"run": {}}),
    "received dict",
    "airl_fast.config.load_config",
    TypeError,
)
_e.refuses(
    "device",
    "a device that is not there",
    lambda t: Trainer(
        load_config("arithmetic", [*SMALL, "run.device=tpu"]),
        task=_task(load_config("arithmetic", SMALL)),
    ),
    "received 'tpu'",
    "`airl-fast doctor` says",
)
_e.refuses(
    "empty",
    "no demonstrations",
    lambda _: load_config("arithmetic", ["task.demonstrations=0"]),
    "received 0",
    "task.demonstrations",
    ConfigError,
)
_e.refuses(
    "option",
    "a prompt that does not fit the token budget",
    run("run.token_budget=44"),
    "do not fit run.token_budget of 44 tokens",
    "raise it or leave the example out",
)
_e.refuses(
    "file",
    "a folder that holds another run",
    run("run.resume=never", prepare=lambda folder, _: (folder / "metrics.jsonl").touch()),
    "already holds a run",
    "choose another run.output_dir",
)
_e.refuses(
    "file",
    "resume=must without a checkpoint",
    run("run.resume=must"),
    "holds no checkpoint",
    "set run.resume=auto to start a new one",
)
_e.refuses(
    "model",
    "the folder of another configuration",
    run(prepare=lambda folder, config: _other(folder, config)),
    "holds a run of another configuration",
    "choose another run.output_dir, or restore the values",
)


def _other(folder: Any, config: RunConfig) -> None:
    (folder / "metrics.jsonl").touch()
    changed = replace(config, sampling=replace(config.sampling, temperature=0.5))
    save_config(changed, folder / "config.yaml")
