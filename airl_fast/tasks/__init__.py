"""Tasks: ``load_task`` builds the one that a configuration names."""

from typing import Any

from airl_fast.schema import TaskConfig
from airl_fast.tasks.base import Example, Message, Task, encode_completion, encode_prompt

__all__ = ["Example", "Message", "Task", "encode_completion", "encode_prompt", "load_task"]


def load_task(config: TaskConfig) -> Task:
    """Build the task of a configuration.

    Raises:
        ValueError: data that is missing, malformed (named with file and line) or too small for
            the subsets asked for.
    """
    if config.name == "arithmetic":
        from airl_fast.tasks.arithmetic import Arithmetic

        return Arithmetic(
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
    if config.name == "gsm8k":
        from airl_fast.tasks.gsm8k import GSM8K

        return GSM8K(
            config.path, **subsets, chat=config.chat, calculator_marks=config.calculator_marks
        )
    if config.name == "medreason":
        from airl_fast.tasks.medreason import MedReason

        return MedReason(config.path, evaluation=config.evaluation, **subsets, chat=config.chat)
    if config.name == "mmlu_pro":
        from airl_fast.tasks.mmlu_pro import MMLUPro

        return MMLUPro(
            config.path,
            traces=config.traces,
            **subsets,
            chat=config.chat,
            correct_only=config.correct_only,
        )
    from airl_fast.tasks.jsonl import JSONLines

    assert config.path is not None  # TaskConfig refuses jsonl without one
    return JSONLines(config.path, **subsets)
