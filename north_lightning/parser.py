"""Argument parsing that explains mistakes: what was not accepted, where, and what was probably meant.

In: jsonargparse's parser and its error text. Out: a short message and exit code 2. Not here: which arguments exist.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
import sys
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import NoneType
from typing import Annotated, Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from pydantic import TypeAdapter, ValidationError

from north_lightning.config_files import load_yaml
from north_lightning.errors import ConfigError

# A config names code: classes of the kind that is asked for, no function that runs what it is given (os.system, ...).
set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=["torch.hub", "torch.load"])
_read_values = get_loader("yaml")


def _load(text: str, path: object = "") -> Any:
    """What jsonargparse reads every config and every argument with."""
    return load_yaml(text, str(path or ""), _read_values)


set_loader("yaml", _load, (yaml.YAMLError,))

NOISE = re.compile(
    r"\s*(Subtypes: |Given value|- Expected a <class 'NoneType'>|Errors:$|- Not a valid subclass"
    r"|Does not validate against|Subclass types expect one of|- a class path|- a dict with)"
)
CALLABLE_NOISE = re.compile(r"Type typing\.Callable.*?: (?=Option)|(?<=is not accepted)\. Got value: Namespace.*")
UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")
UNKNOWN_KEY = re.compile(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)")
UNKNOWN_CLASS = re.compile(r"class_path '([\w.]+)\.(\w+)':?\s+module '[^']+' has no attribute")
UNKNOWN_SHORT_NAME = re.compile(r"Expected a dot import path string: (\w+)")
EXPECTED_CLASSES = re.compile(r"<class '([\w.]+)\.(\w+)'>|(\w[\w.]*)\.(\w+)(?=[\],])")
BOUNDS = {"greater than or equal to": "at least", "less than or equal to": "at most", "greater than": "more than"}
CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")


class ExplainingParser(ArgumentParser):
    """No abbreviations (``--trainer.max_step`` is a mistake, not ``max_steps``), no unknown key that is silently left
    out, and errors with a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **kwargs: Any) -> Namespace:
        """What every config passes through, files and nested blocks alike.

        jsonargparse (4.53) merges configs leaf by leaf, so that an empty block (``max_step: {}``) is gone before it
        looks for unknown keys. Under an unknown key it becomes a leaf here, which is found. A parser of subcommands
        knows no keys and leaves this to theirs.
        """
        known = {action.dest for action in self._actions if not any(o.endswith(".help") for o in action.option_strings)}
        if "subcommand" not in known:
            _keep_empty_blocks(cfg, parent_key, known)
        return super()._apply_actions(cfg, parent_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {shorten(message)}{suggest(message, parser)}\n")
        sys.stderr.write(f"Every key is listed by: {parser.prog.replace(' [options]', '')} --help\n")
        sys.exit(2)


class NorthParser(ExplainingParser):
    """For utility commands."""


def _keep_empty_blocks(block: Namespace | dict[str, Any], path: str, known: set[str]) -> None:
    """Set every empty block in ``block`` (found at ``path``) to None if no known key is at, above or below it."""
    for key, value in list(block.items(branches=True, nested=False) if isinstance(block, Namespace) else block.items()):
        below = f"{path}.{key}" if path else key
        is_group = any(name.startswith(f"{below}.") for name in known)
        if isinstance(value, Namespace | dict) and (is_group or below not in known):
            if value:
                _keep_empty_blocks(value, below, known)
            elif not is_group:
                block[key] = None


def check_values(value: Any, hint: Any, path: str = "") -> None:
    """Refuse numbers out of the range that a type names, NaN, and null where a value is needed, at any depth.

    jsonargparse (4.53) takes null for any type, and forgets ``Annotated`` where annotations are strings.

    Raises:
        ConfigError: one that names the key below ``path``.
    """
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{path}: expected a number, got nan")
    if isinstance(value, list | tuple):
        for item in value:
            check_values(item, next(iter(typing.get_args(_without_none(hint))), None), path)
    elif isinstance(value, Namespace | dict):
        hints = _hints_of(value.get("class_path"), hint)
        items = value.get("init_args") or {} if "class_path" in value else value
        for key, item in items.items(branches=True, nested=False) if isinstance(items, Namespace) else items.items():
            check_values(item, hints.get(key, hints.get("*")), f"{path}.{key}" if path else str(key))
    elif hint is not None and (value is None or typing.get_origin(_without_none(hint)) is Annotated):
        _check_value(value, hint, path)


def _check_value(value: Any, hint: Any, path: str) -> None:
    if value is None:
        if not _takes_none(hint):
            raise ConfigError(f"{path}: expected a value, got null: leave the key out for its default")
        return
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].removeprefix("Input should be ")
        for words, shorter in BOUNDS.items():
            expected = expected.replace(words, shorter)
        raise ConfigError(f"{path}: expected {expected}, got {value}") from None


def _hints_of(class_path: str | None, hint: Any) -> dict[str, Any]:
    """Types of a class's constructor arguments, or of a dataclass's or dictionary's items (``*``)."""
    of: Any = _import(class_path) if class_path else _without_none(hint)
    if typing.get_origin(of) in (dict, Mapping):
        return {"*": typing.get_args(of)[1]}
    hints: dict[str, Any] = {}
    for base in reversed(inspect.getmro(of)) if inspect.isclass(of) and (class_path or is_dataclass(of)) else ():
        with suppress(NameError, TypeError, AttributeError):
            hints |= typing.get_type_hints(vars(base).get("__init__"), include_extras=True)
    return hints


def _without_none(hint: Any) -> Any:
    """X of ``X | None``."""
    inner = [one for one in typing.get_args(hint) if one is not NoneType]
    return inner[0] if _takes_none(hint) and len(inner) == 1 else hint


def _takes_none(hint: Any) -> bool:
    return hint in (Any, None, NoneType) or NoneType in typing.get_args(hint)


def _import(class_path: str) -> Any:
    module_name, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module_name), name)


def shorten(message: str) -> str:
    """``message`` without the lines in which a union of types lists what else it might have been."""
    return "\n".join(CALLABLE_NOISE.sub("", line) for line in message.splitlines() if not NOISE.match(line))


def suggest(message: str, parser: ArgumentParser) -> str:
    """What was probably meant, or nothing."""
    if found := UNKNOWN_OPTION.search(message):
        class_path = _nearest_class_path(message, found)
        meant, candidates = found[1], _parameters_of(class_path) if class_path else _keys_of(parser, True)
    elif found := UNKNOWN_CLASS.search(message):
        meant, candidates = found[2], _names_of(found[1])
    elif found := UNKNOWN_SHORT_NAME.search(message):
        meant, candidates = found[1], _subclasses_named_in(message)
    elif found := UNKNOWN_KEY.search(message):
        meant = found[1] or found[2]
        candidates = _keys_of(parser, with_subcommands=True)
    else:
        return ""
    close = difflib.get_close_matches(meant, candidates, n=1, cutoff=0.6)
    if close:
        return f"\n'{meant}' is unknown; did you mean '{close[0]}'?"
    return f"\n'{meant}' is unknown. Known here: {', '.join(candidates)}" if 0 < len(candidates) < 30 else ""


def _keys_of(parser: ArgumentParser, with_subcommands: bool) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    keys = [option[2:] for option in options if option.startswith("--") and not option.endswith(".help")]
    for action in parser._actions if with_subcommands else ():
        for subparser in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            keys += _keys_of(subparser, with_subcommands=False)
    return keys


def _nearest_class_path(message: str, found: re.Match[str]) -> str:
    """The class an option was not accepted by: named just before it, or after it on the same line."""
    line_end = message.find("\n", found.end())
    after = CLASS_PATH.search(message[found.end() : line_end if line_end >= 0 else len(message)])
    before = CLASS_PATH.findall(message[: found.start()])
    return after[1] if after else before[-1] if before else ""


def _parameters_of(class_path: str) -> list[str]:
    module_name, _, class_name = class_path.rpartition(".")
    if not module_name:
        return []
    chosen = getattr(importlib.import_module(module_name), class_name)
    constructors = [vars(base)["__init__"] for base in inspect.getmro(chosen)[:-1] if "__init__" in vars(base)]
    names = dict.fromkeys(name for constructor in constructors for name in inspect.signature(constructor).parameters)
    return [name for name in names if name not in ("self", "args", "kwargs", "params")]


def _subclasses_named_in(message: str) -> list[str]:
    """Names of all imported subclasses of the classes that ``message`` lists as expected."""
    subtypes = next((line for line in message.splitlines() if line.lstrip().startswith("Subtypes: ")), "")
    names: dict[str, None] = {}
    for in_brackets, class_name, module_name, generic in EXPECTED_CLASSES.findall(subtypes):
        module = sys.modules.get(in_brackets or module_name)
        waiting = [getattr(module, class_name or generic, None)]
        while waiting:
            expected = waiting.pop()
            if isinstance(expected, type) and expected is not type(None):
                names[expected.__name__] = None
                waiting += expected.__subclasses__()
    return list(names)


def _names_of(module_name: str) -> list[str]:
    return [name for name in vars(importlib.import_module(module_name)) if not name.startswith("_")]
