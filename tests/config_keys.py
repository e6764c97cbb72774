"""Every key that a config can hold, found by walking the types of the constructors, and whether anything reads it.

A parameter is *read* if a value derived from it goes anywhere but into an attribute, a check that raises, or a copy of
the object; or into an attribute that is read so. Reads of an attribute are looked for in the class and its relatives
(``self.x``), and in every module that names one of them (``anything.x``).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import north_lightning
from north_lightning import cli

PACKAGE = Path(north_lightning.__file__).parent
ROOTS = (Callback, LightningModule, LightningDataModule, Logger, Strategy, Optimizer, LRScheduler)
"""What Lightning takes from a config; subclasses in the package are chosen there."""
OWN = ("north_lightning", "dead_keys")
PROGRAMS = ("__main__", "_plugin", "vllm_engine", "_runner", "verifiers.seal")
"""Modules that run in processes of others, and are not imported here."""
NOT_CHOSEN = ("north_lightning.conformance",)
COPIES = ("__getstate__", "__setstate__", "__reduce__", "__repr__", "__eq__", "__hash__")
CHECKS = ("__init__", "__post_init__", "check", "_check")
"""Beginnings of names of methods whose ``if ...: raise`` is a check of values, and no use of them."""


# ---- which keys there are -------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, ModuleType]:
    """All modules of the package by name, and the plug-ins that ship beside it."""
    files = [file.relative_to(PACKAGE.parent).with_suffix("") for file in sorted(PACKAGE.rglob("*.py"))]
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    return {name: importlib.import_module(name) for name in names if not name.endswith(PROGRAMS)}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(Path(str(sys.modules[module].__file__)).read_text())


def classes() -> Iterator[type]:
    for name, module in modules().items():
        for one in vars(module).values():
            if isinstance(one, type) and one.__module__ == name:
                yield one


def is_own(one: Any) -> bool:
    return (getattr(one, "__module__", None) or "").startswith(OWN)


def is_root(one: type) -> bool:
    """A subclass of what Lightning or torch takes from a config."""
    return issubclass(one, ROOTS)


def named_in(annotation: Any) -> Iterator[Any]:
    """Classes of the package anywhere in a type; what a callable returns, not what it takes."""
    if isinstance(annotation, type) and is_own(annotation):
        yield annotation
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is not None and "Callable" in str(typing.get_origin(annotation)):
        arguments = arguments[-1:]
    for argument in arguments:
        yield from named_in(argument)


def parameters(one: Any) -> dict[str, tuple[Any, inspect.Parameter]]:
    """Parameter -> its type, and where it is declared; ``**kwargs`` are the next class's."""
    if not isinstance(one, type) or dataclasses.is_dataclass(one):
        target = one.__init__ if isinstance(one, type) else one
        owners = [(one, target)]
    else:
        owners = [(base, vars(base)["__init__"]) for base in inspect.getmro(one) if "__init__" in vars(base)]
    found: dict[str, tuple[Any, inspect.Parameter]] = {}
    for owner, function in owners:
        if not is_own(owner):
            break
        hints = hints_of(owner, function)
        signature = inspect.signature(function).parameters
        for name, parameter in signature.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, (owner, parameter.replace(annotation=hints.get(name))))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
            break
    return found


def hints_of(owner: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """Types of parameters, those under TYPE_CHECKING included."""
    known: dict[str, Any] = {}
    for name, value in {**vars(sys.modules[owner.__module__])}.items():
        known[name] = value
    target = owner if dataclasses.is_dataclass(owner) else function
    for _ in range(20):
        try:
            return typing.get_type_hints(target, localns=known)
        except NameError as missing:
            known[str(missing.name)] = Any
    return {}


def chosen() -> dict[str, Any]:
    """Every class and command whose parameters are keys of some config, by its full name."""
    commands = [getattr(importlib.import_module(m), f) for m, f in (at.split(":") for at, _ in cli.UTILITIES.values())]
    every = [one for one in classes() if not one.__name__.startswith("_")]
    waiting: list[Any] = [*commands, *(one for one in every if is_root(one))]
    found: dict[str, Any] = {}
    while waiting:
        one = waiting.pop()
        name = f"{one.__module__}.{one.__qualname__}"
        if name in found or one.__name__.startswith("_") or one.__module__.startswith(NOT_CHOSEN):
            continue
        if not isinstance(one, type) or not inspect.isabstract(one):
            found[name] = one
        for _, parameter in parameters(one).values():
            for part in named_in(parameter.annotation):
                waiting.append(part)
                if not dataclasses.is_dataclass(part):
                    waiting += [other for other in every if issubclass(other, part)]
    return found


# ---- who reads them -------------------------------------------------------------------------------------------------


def raises_only(statement: ast.stmt) -> bool:
    """``if ...: raise``, or a loop of such."""
    if isinstance(statement, ast.Raise):
        return True
    if isinstance(statement, ast.If | ast.For):
        body = [*statement.body, *statement.orelse]
        return all(raises_only(one) or is_plain_assign(one) for one in body) and any(map(raises_only, body))
    return False


def is_plain_assign(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets)


def statements(body: list[ast.stmt], is_check: bool = False) -> Iterator[ast.AST]:
    """Every node, but those of checks."""
    for statement in body:
        if is_check and raises_only(statement):
            continue
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if statement.name in COPIES:
                continue
            yield statement
            yield from statements(statement.body, statement.name.startswith(CHECKS))
            yield from (node for one in statement.decorator_list for node in ast.walk(one))
            continue
        yield statement
        for node in ast.iter_child_nodes(statement):
            if isinstance(node, ast.stmt):
                yield from statements([node], is_check)
            elif isinstance(node, ast.ExceptHandler | ast.match_case):
                yield from statements(node.body, is_check)
            else:
                yield from ast.walk(node)


def loads_of(name: str, nodes: Iterator[ast.AST]) -> list[ast.AST]:
    return [node for node in nodes if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)]


@cache
def class_node(one: type) -> ast.ClassDef:
    path = one.__qualname__.split(".")
    body: list[ast.stmt] = tree(one.__module__).body
    for part in path:
        node = next(
            node for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.ClassDef) and node.name == part
        )
        body = node.body
    return node


def own_bases(one: type) -> list[type]:
    return [base for base in inspect.getmro(one) if is_own(base)]


def relatives(one: type) -> list[type]:
    return [*own_bases(one), *(other for other in classes() if issubclass(other, one) and other is not one)]


def self_attributes(target: ast.AST) -> list[str]:
    return [
        node.attr
        for node in ast.walk(target)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]


def stores(name: str, assign: ast.Assign | ast.AnnAssign) -> list[str] | None:
    """The attributes of ``self`` that hold what is made of ``name``; None if that goes elsewhere."""
    targets = assign.targets if isinstance(assign, ast.Assign) else [assign.target]
    value = assign.value
    if value is None:
        return None
    found = []
    for target in targets:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = list(zip(target.elts, value.elts, strict=True))
        else:
            pairs = [(target, value)]
        for one, held in pairs:
            if loads_of(name, ast.walk(held)):
                if not isinstance(one, ast.Attribute) or not self_attributes(one):
                    return None
                found += self_attributes(one)
    return found


def is_read(one: Any, owner: Any, name: str) -> bool:
    """Whether anything is made of the parameter."""
    if not isinstance(one, type):
        return function_reads(one, name)
    if dataclasses.is_dataclass(owner):
        return attribute_is_read(one, name)
    init = next(
        node for node in class_node(owner).body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    for node in statements(init.body, is_check=True):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            if node.value is None or not loads_of(name, ast.walk(node.value)):
                continue
            held = stores(name, node)
            if held is None or any(attribute_is_read(one, attribute) for attribute in held):
                return True
        elif isinstance(node, ast.Expr | ast.Return | ast.For | ast.With) and loads_of(name, ast.walk(node)):
            return True
    return False


def function_reads(function: Any, name: str) -> bool:
    found = (
        node for node in tree(function.__module__).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    node = next(node for node in found if node.name == function.__name__)
    return bool(loads_of(name, statements(node.body, is_check=True)))


@cache
def attribute_is_read(one: type, attribute: str) -> bool:
    family = relatives(one)
    for relative in family:
        if any(is_self for is_self in attributes_of(class_node(relative)).get(attribute, ())):
            return True
    names = {relative.__name__ for relative in family} | holders(one)
    modules_of_family = {relative.__module__ for relative in family}
    return any(
        not is_self
        for module in {*modules(), *modules_of_family}
        if names & identifiers(module)
        for is_self in attributes_of(tree(module)).get(attribute, ())
    )


@cache
def holders(one: type) -> frozenset[str]:
    """Names of the classes that have one among their parameters, or in a structure of them."""
    return frozenset(
        other.__name__
        for other in chosen().values()
        if isinstance(other, type)
        and any(one in named_in(parameter.annotation) for _, parameter in parameters(other).values())
    )


@cache
def attributes_of(node: ast.Module | ast.ClassDef) -> dict[str, list[bool]]:
    """Attribute -> for each place that reads it, whether it is one of ``self``."""
    found: dict[str, list[bool]] = {}
    for part in statements(node.body):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load):
            is_self = isinstance(part.value, ast.Name) and part.value.id == "self"
            found.setdefault(part.attr, []).append(is_self)
    return found


@cache
def identifiers(module: str) -> frozenset[str]:
    """Names that a module uses: in code, imports and annotations."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return frozenset(found)


# ---- limits and seeds that no key reaches ---------------------------------------------------------------------------


def hidden_defaults(is_hidden: Callable[[str], object], names: Iterable[str] | None = None) -> list[str]:
    """Calls within the package that leave a parameter at its default, which then no key reaches.

    A default in place of a key that was left out (``given or Default()``) is none of them.
    """
    found = []
    for module in modules() if names is None else names:
        if module.startswith((*NOT_CHOSEN, "north_lightning.faults")):
            continue
        spare = {id(one.values[-1]) for one in ast.walk(tree(module)) if isinstance(one, ast.BoolOp)}
        for call in ast.walk(tree(module)):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or id(call) in spare:
                continue
            callee = vars(sys.modules[module]).get(call.func.id)
            if not callable(callee) or not is_own(callee) or any(k.arg is None for k in call.keywords):
                continue
            is_record = callee.__module__ == "north_lightning.types" or callee.__name__.startswith("_")
            if is_record or any(isinstance(one, ast.Starred) for one in call.args):
                continue
            try:
                signature = inspect.signature(callee)
            except ValueError:
                continue
            given = {keyword.arg for keyword in call.keywords} | set(list(signature.parameters)[: len(call.args)])
            for parameter in signature.parameters.values():
                has_own = parameter.default not in (parameter.empty, None) and parameter.name not in given
                if has_own and is_hidden(parameter.name):
                    found.append(f"{module}:{callee.__name__}.{parameter.name}")
    return sorted(set(found))


def unused_arguments() -> list[str]:
    """Arguments that a function does not read, of functions that are called by name: a key may end there.

    Methods and functions that are handed to others have the arguments that their callers give.
    """
    found = []
    for module in modules():
        called = {id(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
        loaded = (node for node in ast.walk(tree(module)) if isinstance(node, ast.Name) and id(node) not in called)
        handed = {node.id for node in loaded if isinstance(node.ctx, ast.Load)}
        for node in tree(module).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in handed:
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
                names = [one.arg for one in arguments if not one.arg.startswith("_") and one.arg not in used]
                found += [f"{module}:{node.name}.{name}" for name in names]
    return found


# ---- what the shipped configs say -----------------------------------------------------------------------------------


def leaves(values: Any, one: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """(path, what its key is a parameter of, the key) for every key of a config's section that makes ``one``."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from leaves(value, one, f"{path}[{number}]")
    elif isinstance(values, dict) and "class_path" in values:
        yield from leaves(values.get("init_args") or {}, resolve(values["class_path"]), path)
    elif isinstance(values, dict) and isinstance(one, Named):
        for name, value in values.items():
            yield from leaves(value, one.each, f"{path}.{name}")
    elif isinstance(values, dict) and one is not None:
        for key, value in values.items():
            yield f"{path}.{key}", one, key
            yield from leaves(value, made_from(one, key), f"{path}.{key}")


@dataclasses.dataclass(frozen=True)
class Named:
    """A mapping from names to parts."""

    each: Any


def made_from(one: Any, key: str) -> Any:
    """What the value of this key is made into; None for plain values, and for parts of other packages."""
    if not is_own(one) or key not in parameters(one):
        return None
    annotation = parameters(one)[key][1].annotation
    part = next(named_in(annotation), None)
    return Named(part) if part and re.search(r"\b(dict|Mapping)\[str", str(annotation)) else part


def resolve(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    if module:
        found: type = getattr(importlib.import_module(module), name)
        return found
    return next(one for one in classes() if one.__name__ == class_path)
