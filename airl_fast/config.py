"""Configurations from YAML files, recipes and overrides; the fields are those of ``schema.py``.

Whatever is wrong is a ``ConfigError`` that names the dotted key and the remedy, before any model
is loaded.
"""

import difflib
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from airl_fast.durable import write_text
from airl_fast.parsing import shown
from airl_fast.schema import RunConfig, RunSection, TaskConfig
from airl_fast.schema_guards import GuardsConfig
from airl_fast.schema_models import (
    AlgorithmConfig,
    DiscriminatorConfig,
    PolicyConfig,
    SamplingConfig,
)

__all__ = [
    "AlgorithmConfig",
    "ConfigError",
    "DiscriminatorConfig",
    "GuardsConfig",
    "PolicyConfig",
    "RunConfig",
    "RunSection",
    "SamplingConfig",
    "TaskConfig",
    "check_is_config",
    "describe_config",
    "load_config",
    "recipes",
    "save_config",
]


_LONGEST_KEY = 100  # characters; what is longer is cut in a message
_DEEPEST = 50  # levels of YAML; a configuration has three
_MOST_PROBLEMS = 20  # lines of a message


class ConfigError(ValueError):
    """A configuration that cannot be run: the key, what it holds, and what to do."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases, and in which a repeated key is an error: PyYAML keeps the last."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases, and nesting that takes PyYAML the square of its depth."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases are not taken: write the value out", event.start_mark
            )
        if self._depth == _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after checking that its keys differ."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the parent class words this refusal
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def check_is_config(given: object) -> None:
    """Refuse anything but a configuration that has been checked.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(given, RunConfig):
        raise TypeError(
            f"expected a RunConfig, received {type(given).__name__}: make one with "
            "airl_fast.config.load_config"
        )


def load_yaml(text: str) -> Any:
    """Read YAML as plain values.

    Raises:
        ValueError: no YAML, a key given twice, an alias (a few of them can stand for more than
            any memory holds), or what Python cannot make of a number or a date.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: it builds plain values only
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        # PyYAML's constructors raise the last three where a tag does not fit its value.
        raise ValueError(f"{type(error).__name__}: {str(error)[:1000]}") from None


def recipes() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("airl_fast.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration and check it.

    Args:
        source: a YAML file, or the name of a recipe (``recipes()`` lists them).
        overrides: ``section.key=value``, the value read as YAML; the last one of a key holds.

    Raises:
        ConfigError: no such file or recipe, unreadable YAML, an unknown key, a wrong type or a
            contradiction. All that is wrong in the fields is reported at once.
    """
    name, text = _read(source)
    tree = _parse(text, name)
    for override in overrides:
        _apply(tree, override)
    _check_keys(tree)
    try:
        return RunConfig(**tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from None


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the whole configuration, defaults included, as YAML that ``load_config`` reads."""
    tree = _plain(asdict(config))
    write_text(Path(path), yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def describe_config() -> str:
    """List every key with its type, default and meaning, section by section."""
    lines = []
    for section, cls in _sections().items():
        lines.append(f"{section}: {(cls.__doc__ or '').strip()}")
        for key, info in _fields(cls).items():
            default = "required" if info.is_required() else f"default {_shown(info.default)}"
            hint = _type_name(get_type_hints(cls)[key])
            lines.append(f"  {section}.{key} ({hint}; {default})")
            lines.append(f"      {info.description}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _sections() -> dict[str, type]:
    return {field.name: get_type_hints(RunConfig)[field.name] for field in fields(RunConfig)}


def _fields(cls: type) -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return found


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return yaml.safe_dump(value).split("\n")[0]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type_name(hint: Any) -> str:
    """Return a type as a user would say it: ``one of a, b``, ``integer or null``."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        arguments = get_args(hint)
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{_type_name(arguments[0])}s"
    if get_args(hint):
        return " or ".join(_type_name(argument) for argument in get_args(hint))
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, "null")


def _plain(value: Any) -> Any:
    """Return the value with tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the name and the text of a file or recipe."""
    name = os.fspath(source)
    if name in recipes():
        return name, (resources.files("airl_fast.recipes") / f"{name}.yaml").read_text("utf-8")
    path = Path(name)
    if path.is_file():
        try:
            return name, path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{name}: cannot be read: {error}; check its rights, and save it as UTF-8"
            ) from None
    known = ", ".join(recipes())
    if path.suffix in (".yaml", ".yml") or path.name != name:
        raise ConfigError(f"{name}: no such file; give a YAML file or a recipe ({known})")
    raise ConfigError(
        f"{name!r} is no file and no recipe{_did_you_mean(name, recipes())} ({known})"
    )


def _parse(text: str, where: str) -> dict[str, Any]:
    """Return YAML text as sections; an empty section counts as absent."""
    try:
        tree = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected sections such as `run:`, received {shown(tree)}")
    return {key: value for key, value in tree.items() if value is not None}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in place."""
    key, equals, text = override.partition("=")
    section, dot, field = key.partition(".")
    if not equals or not text.strip():
        raise ConfigError(
            f"the override {shown(override)} has no value; write section.key=value, such as "
            "run.steps=100 (null for none)"
        )
    if not dot and section in _sections():
        raise ConfigError(
            f"the override {shown(override)} sets a whole section; write {key}.KEY=VALUE"
        )
    if not dot:
        raise ConfigError(f"the override {shown(override)}: {_unknown(section)}")
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {shown(text)} is not readable as YAML: {error}") from None
    branch = tree.setdefault(section, {})
    if isinstance(branch, dict):  # otherwise _check_keys names the section
        branch[field] = value


def _unknown(key: str) -> str:
    """Say that a dotted or bare key is unknown, with the nearest one that exists."""
    if len(key) > _LONGEST_KEY:
        return f"{key[:_LONGEST_KEY]}...: no such key (`airl-fast train --help` lists all)"
    all_keys = [f"{name}.{field}" for name, cls in _sections().items() for field in _fields(cls)]
    section, _, field = key.rpartition(".")
    mine = [known.partition(".")[2] for known in all_keys if known.startswith(f"{section}.")]
    near = [f"{section}.{name}" for name in difflib.get_close_matches(field, mine, 1)]
    same = [known for known in all_keys if known.partition(".")[2] == field]
    found = near + same or difflib.get_close_matches(key, [*all_keys, *_sections()], 1)
    hint = f"; did you mean {' or '.join(found)}?" if found else ""
    return f"{key}: no such key{hint} (`airl-fast train --help` lists all)"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_keys(tree: dict[str, Any]) -> None:
    """Refuse unknown and missing keys, all of them at once."""
    problems = list(_key_problems(tree))
    if len(problems) > _MOST_PROBLEMS:
        rest = len(problems) - _MOST_PROBLEMS
        problems = [*problems[:_MOST_PROBLEMS], f"and {rest} more"]
    if problems:
        raise ConfigError("\n".join(problems))


def _key_problems(tree: dict[str, Any]) -> Iterator[str]:
    sections = _sections()
    for name, branch in tree.items():
        if name not in sections:
            keys = [f"{name}.{key}" for key in branch] if isinstance(branch, dict) else [str(name)]
            yield from map(_unknown, keys)
        elif not isinstance(branch, dict):
            yield f"{name}: expected `key: value` lines, received {shown(branch)}"
        else:
            known = _fields(sections[name])
            yield from (_unknown(f"{name}.{key}") for key in branch if key not in known)
    for name, cls in sections.items():
        given = tree.get(name, {})
        for key, info in _fields(cls).items():
            if info.is_required() and isinstance(given, dict) and key not in given:
                yield (
                    f"{name}.{key}: required ({info.description}); set it in the file or with "
                    f"{name}.{key}=VALUE"
                )


def _explain(error: ValidationError) -> Iterator[str]:
    """Turn pydantic's errors into lines of key, what is expected, what was received."""
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error" and len(item["loc"]) <= 1:
            yield message  # a contradiction: its message names the keys
            continue
        received = item["input"]
        line = f"{key}: {message[0].lower()}{message[1:]}"
        if "received" not in line:
            line += f"; received {shown(received)} ({type(received).__name__})"
        if item["type"] == "string_type":
            line += f"; quote it: {key}='\"{shown(received)}\"'"
        if item["type"] == "tuple_type":
            line += f"; write a list: {key}='[\"{received}\"]'"
        section, _, field = key.partition(".")
        info = _fields(_sections()[section]).get(field.split(".")[0])
        if info is not None and info.description:
            line += f" [{info.description}]"
        yield line
