"""Argument parsing that explains mistakes: what was not accepted, where, and what was probably meant.

In: jsonargparse's parser and its error text. Out: a short message and exit code 2. Not here: which arguments exist.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from pydantic import TypeAdapter, ValidationError

from north_lightning.config_files import classes, load_yaml, place_of, set_in_file
from north_lightning.errors import ConfigError

# A config names code: classes of the kind that is asked for, no function that runs what it is given (os.system, ...).
set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=["torch.hub", "torch.load"])
_read_values = get_loader("yaml")


def _load(text: str, path: object = "") -> Any:
    """What jsonargparse reads every config and every argument with."""
    return load_yaml(text, str(path or ""), _read_values)


set_loader("yaml", _load, (yaml.YAMLError,))

NOISE = re.compile(
    r"\s*(Subtypes: |Given value|- Expected a <class 'NoneType'>|Errors:$|- Not a valid subclass|Unable to load config "
    r"|Does not validate against|- Does not validate|Subclass types expect one of|- a class path|- a dict with)"
)
CALLABLE_NOISE = re.compile(
    r"Type typing\.Callable.*? expects a function or a callable class: |\.? Got value: Namespace.*"
)
KEY = re.compile(r'Parser key "([^"]+)":?\s*')
CLASS = re.compile(r"Problem with given class_path '([\w.]+)':?\s*")
TYPE_ONLY = re.compile(r"expected (path but|\w+$|a number|collections)|Not of type Path")
NUMBER = re.compile(r"expected a number")
PLAINER = {
    r"^Expected a ": "expected ",
    r"<class '(?:[\w.]+\.)?(\w+)'>": r"\1",
    r"typing\.Literal\[(.*?)\]": r"one of \1",
    r"\. Got value: ": ", got ",
    r"^expected (int|float)$": r"expected a number (\1)",
    r"^expected dot import path string: (\w+).*": r"no class is called '\1'",
    r"^Option '([^']+)' is not accepted": r"unknown key '\1'",
    r"^Group '([^']+)' does not accept option '([^']+)'": r"unknown key '\1.\2'",
    r"^Subcommand '\w+' does not accept option '([^']+)'": r"unknown key '\1'",
    r"^the following arguments are required: ": "missing, or null: ",
    r"\b(?:fit|validate|predict)\.": "",
    r"does not conform to restriction v": "expected a number ",
}
UNKNOWN_KEY = re.compile(r"unknown key '([^']+)'|unrecognized arguments: --([^\s=]+)")
BARE = re.compile(r"unrecognized arguments: (\w[\w.]*=\S*|[\w./~-]+\.ya?ml$)")
UNKNOWN_CLASS = re.compile(
    r"no class is called '(\w+)'|no attribute '(\w+)'|path [\w.]*?(\w+) does not correspond|No module named '([\w.]+)'"
)
BOUNDS = {"greater than or equal to": "at least", "less than or equal to": "at most", "greater than": "more than"}
KIND = "expected another kind of value"
MAX_PROBLEMS = 3
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "weight_decay", "betas"), "model.optimizer's init_args"),
    **dict.fromkeys(("warmup_steps", "total_steps"), "model.lr_scheduler's init_args"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "data.row_tokens, trainer.accumulate_grad_batches"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "trainer.max_epochs"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "max_length", "seq_len"), "data.row_tokens"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from"), "resume, at the top level"),
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gpus": "trainer.devices",
    "gradient_clip_val": "model.max_grad_norm",
}
"""Keys that people look for in another place, or by another trainer's name, and where they are here."""


class ExplainingParser(ArgumentParser):
    """No abbreviations (``--trainer.max_step`` is a mistake, not ``max_steps``), no unknown key that is silently left
    out, and errors with a suggestion."""

    commands: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """All utility commands, as in ``cli.UTILITIES``."""

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
        try:
            said = parser._wrong_config() or explain(message, parser)
        except Exception:  # a mistake must not end in a traceback
            said = " ".join(message.split())[:400]
        sys.stderr.write(f"error: {said}\n")
        sys.stderr.write(f"Every key is listed by: {parser.prog.replace(' [options]', '')} --help\n")
        sys.exit(2)

    def _wrong_config(self) -> str | None:
        """What is said of a config of another command; that is why its keys are unknown."""
        given, known = set(set_in_file() or ()), {key.split(".")[0] for key in _keys_of(self, True)}
        if len(given) < 2 or given & known - {"seed", "seed_everything"}:
            return None
        for command, (location, _) in ExplainingParser.commands.items():
            with suppress(ImportError):
                if given <= set(inspect.signature(pkgutil.resolve_name(location)).parameters):
                    return f"{', '.join(sorted(given))}: keys of the command {command}, not of this one"
        return "model, data, trainer: keys of the command fit, not of this one" if "trainer" in given else None


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
        raise ConfigError(f"{path}: expected a finite number, got nan")
    if isinstance(value, Path) and re.search(r"\$\{?\w|^~", str(value)):
        raise ConfigError(f"{path}: expected a path as it is, got '{value}': neither variables nor ~ are filled in")
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
    of: Any = _import(str(class_path)) if class_path else _without_none(hint)
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
    """The class; None where there is none."""
    module_name, _, name = class_path.rpartition(".")
    with suppress(ImportError, AttributeError, ValueError):
        return getattr(importlib.import_module(module_name), name)


def explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's ``message`` in a few lines: file and line, key, what was expected and got, what was meant.

    Where a value may be of several types, jsonargparse says of each why it is not: types alone are left out where
    something more particular is known.
    """
    path, problems = _read_message(message)
    keys = ".".join(part for is_class, part in path if not is_class)
    if any(map(NUMBER.match, problems)):  # a text is not a number, rather than no class
        problems = [problem for problem in problems if not problem.startswith(("no class", "expected path"))]
    particular = [problem for problem in problems if not TYPE_ONLY.match(problem)]
    said = "; or ".join(dict.fromkeys((particular or problems)[:MAX_PROBLEMS])) or KIND
    if said == KIND and is_dataclass(of := _without_none(_hint_at(path, parser))):
        said = f"expected keys below it: {', '.join(_hints_of(None, of))}"
    place = place_of(f"{keys}.{found[1]}".lstrip(".") if (found := UNKNOWN_KEY.search(said)) and found[1] else keys)
    if said.startswith("missing") and path and path[-1][0]:
        said += f" (of {path[-1][1].rpartition('.')[2]})"
    given = re.findall(r"Given value: (.*?)(?=\. Got value: |$)", message, re.MULTILINE)
    said += f", got {given[0 if NUMBER.match(said) else -1][:100]}" if given and TYPE_ONLY.match(said) else ""
    start = f"{place}: " if place else ""
    return f"{start}{keys}{': ' if keys else ''}{said[:400]}{suggest(said, path, parser)}"


def _read_message(message: str) -> tuple[list[tuple[bool, str]], list[str]]:
    """The keys and (True) classes on the way to what is wrong, and what is."""
    path: list[tuple[bool, str]] = []
    problems = []
    for line in message.splitlines():
        rest = "" if NOISE.match(line) else CALLABLE_NOISE.sub("", line).strip().removeprefix("- ")
        while found := KEY.match(rest) or CLASS.match(rest):
            if (step := (found.re is CLASS, found[1])) not in path:
                path.append(step)
            rest = CALLABLE_NOISE.sub("", rest[found.end() :])
        if found := re.search(r"is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", line):
            path.append((True, found[1]))  # of a callable: named after what is wrong with it
        for pattern, plainer in PLAINER.items():
            rest = re.sub(pattern, plainer, rest)
        problems += [rest] if rest else []
    return path, problems


def suggest(said: str, path: list[tuple[bool, str]], parser: ArgumentParser) -> str:
    """What was probably meant, or nothing."""
    if found := UNKNOWN_CLASS.search(said):
        meant = path[-1][1].rpartition(".")[2] if found[4] and path else next(filter(None, found.groups()))
        candidates = _classes_for(_hint_at(path, parser))
    elif found := BARE.search(said):
        return f"\nwrite {'--config ' if found[1].endswith(('.yaml', '.yml')) else '--'}{found[1]}"
    elif found := UNKNOWN_KEY.search(said):
        meant = found[1] or found[2]
        if (name := meant.partition(".")[0]) in classes():
            return f"\n'{name}' is a class: write it as class_path: {name}, and its keys under init_args"
        if (name := meant.rpartition(".")[2]) in ELSEWHERE:
            return f"\n'{name}' is set by {ELSEWHERE[name]}"
        hint = _hint_at(path, parser)
        if path and not path[-1][0] and not is_dataclass(_without_none(hint)) and (names := _classes_for(hint)):
            return f"\nexpected a class here: class_path, such as {names[-1]}, and its keys under init_args"
        if path and path[-1][0] and "." in meant:
            group, _, meant = meant.rpartition(".")
            path, hint = path[:-1], _hint_at([*path, (False, group)], parser)
        of = _without_none(hint) if "." in (found[1] or "") else None
        candidates = list(_hints_of(None, hint)) if is_dataclass(_without_none(hint)) else []
        candidates = candidates or (_parameters_of(of) if inspect.isclass(of) else [])
        candidates = candidates or _parameters_of(_import(path[-1][1])) if path and path[-1][0] else candidates
        candidates = candidates or _keys_of(parser, True)
    else:
        return ""
    if close := _closest(meant, candidates):
        return f"\n'{meant}' is unknown; did you mean '{close}'?"
    return f"\n'{meant}' is unknown. Known here: {', '.join(candidates)}" if 0 < len(candidates) < 30 else ""


def _closest(meant: str, candidates: Sequence[str]) -> str | None:
    """In any case; a name that only begins or ends as it should is close too."""
    lower = {name.lower(): name for name in reversed(candidates)}
    parts = [name for name in lower if name.startswith(meant.lower()) or name.endswith(f".{meant.lower()}")]
    cutoff = 0.6 if len(meant) > 3 else 0.8
    close = (
        difflib.get_close_matches(meant.lower(), lower, 1, cutoff) if meant.lower() not in lower else [meant.lower()]
    )
    return next((lower[name] for name in [*close, *sorted(parts, key=len)]), None)


def _hint_at(path: list[tuple[bool, str]], parser: ArgumentParser) -> Any:
    """The type of the last key of ``path``; None if that is not known."""
    keys = path[:-1] if path and path[-1][0] else path
    above = [part for is_class, part in keys[:-1] if is_class]
    if not keys:
        return None
    if not above:
        return next((getattr(a, "_typehint", None) for a in parser._actions if a.dest == keys[0][1]), None)
    hint: Any = None
    for index, part in enumerate(keys[-1][1].split(".")):
        hints = _hints_of(None if index else above[-1], hint)
        hint = hints.get(part, hints.get("*"))
    return hint


def _classes_for(hint: Any) -> list[str]:
    """Names of the classes that may stand where ``hint`` is expected, not yet imported ones of the package too."""
    waiting, names = [hint], dict[str, None]()
    while waiting:
        one = waiting.pop()
        if inspect.isclass(one) and one.__module__ != "builtins" and not typing.get_args(one):
            if not inspect.isabstract(one) and not one.__name__.startswith("_"):
                names[one.__name__] = None
            waiting += one.__subclasses__() if hasattr(one, "__subclasses__") else []
            names |= dict.fromkeys(name for name, (_, bases) in classes().items() if one.__name__ in bases)
        else:
            waiting += [arg for arg in typing.get_args(one) if not isinstance(arg, list)]
    return list(names)


def _keys_of(parser: ArgumentParser, with_subcommands: bool) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    keys = [option[2:] for option in options if option.startswith("--") and not option.endswith(".help")]
    for action in parser._actions if with_subcommands else ():
        for subparser in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            keys += _keys_of(subparser, with_subcommands=False)
    return keys


def _parameters_of(chosen: type) -> list[str]:
    constructors = [vars(base)["__init__"] for base in inspect.getmro(chosen)[:-1] if "__init__" in vars(base)]
    names = dict.fromkeys(name for constructor in constructors for name in inspect.signature(constructor).parameters)
    return [name for name in names if name not in ("self", "args", "kwargs", "params")]
