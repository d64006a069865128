"""What every section of a configuration is made of; see ``schema.py``."""

from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):  # bool is an int in Python; `steps: yes` is a mistake
        raise ValueError(f"expected a number, received {value!r}")
    return value


Int = Annotated[int, BeforeValidator(_not_boolean)]
Float = Annotated[float, BeforeValidator(_not_boolean), Field(allow_inf_nan=False)]
Betas = tuple[Annotated[Float, Field(ge=0, lt=1)], Annotated[Float, Field(ge=0, lt=1)]]


_T = TypeVar("_T")


def _keywords_only(cls: type, value: Any) -> Any:
    if isinstance(value, ArgsKwargs) and value.args:
        raise ValueError(f"{cls.__name__} takes keywords only, received {value.args!r}")
    return value


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(cls: type[_T]) -> type[_T]:
    """Make a frozen, keyword-only dataclass that refuses unknown fields.

    pydantic accepts positional values for ``Field`` defaults in spite of ``kw_only=True``
    (2.14), hence the check of our own.
    """
    check: Any = classmethod(_keywords_only)
    setattr(cls, _keywords_only.__name__, model_validator(mode="before")(check))
    built: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    return built


def refuse_if(*cases: tuple[bool, str]) -> None:
    """Raise with the message of the first case that holds."""
    for holds, message in cases:
        if holds:
            raise ValueError(message)
