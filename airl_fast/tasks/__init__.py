"""Tasks: ``load_task`` builds the one that a configuration names."""

from importlib import import_module
from typing import Any

from airl_fast.schema import TaskConfig
from airl_fast.tasks.base import Example, Message, Task, encode_completion, encode_prompt

__all__ = [
    "TASKS",
    "Example",
    "Message",
    "Task",
    "encode_completion",
    "encode_prompt",
    "load_task",
    "task_class",
]

TASKS = {  # by name, the class in the module of that name
    "arithmetic": "Arithmetic",
    "countdown": "Countdown",
    "gsm8k": "GSM8K",
    "jsonl": "JSONLines",
    "medreason": "MedReason",
    "mmlu_pro": "MMLUPro",
}


def task_class(name: str) -> Any:
    """Return the class of one of ``TASKS``; nothing is loaded."""
    return getattr(import_module(f"airl_fast.tasks.{name}"), TASKS[name])


def load_task(config: TaskConfig) -> Task:
    """Build the task of a configuration.

    Raises:
        ValueError: data that is missing, malformed (named with file and line) or too small for
            the subsets asked for.
    """
    make = task_class(config.name)
    if config.generated:
        return make(
            config.seed,
            demonstrations=600 if config.demonstrations is None else config.demonstrations,
            unlabelled=config.unlabelled,
            validation=config.validation,
            test=config.test,
            expert_error=config.expert_error,
        )
    subsets: dict[str, Any] = {
        "seed": config.seed,
        "demonstrations": config.demonstrations,
        "unlabelled": config.unlabelled,
        "validation": config.validation,
        "test": config.test,
    }
    own: dict[str, dict[str, Any]] = {
        "gsm8k": {"chat": config.chat, "calculator_marks": config.calculator_marks},
        "medreason": {"chat": config.chat, "evaluation": config.evaluation},
        "mmlu_pro": {
            "chat": config.chat,
            "traces": config.traces,
            "correct_only": config.correct_only,
        },
        "jsonl": {},  # TaskConfig refuses it without a path
    }
    return make(config.path, **subsets, **own[config.name])
