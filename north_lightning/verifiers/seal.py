"""Whether what judges, and what tests use, still is what it was. It runs *inside* a sandbox.

In: namespaces. Out: ``Tampered`` if a function or class in one of them is another one now, or has another body. Watched
are the modules of the standard library that the tests, or what judges them, are made of; the functions, classes and
constants of the test files; and that helpers of the tests were loaded from where the tests are.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping

from apart import Tampered  # type: ignore[import-not-found]

TYPE_CHECKING = False  # typing takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

    Namespace = Mapping[str, Any]
    Constant = tuple[Namespace, str, object]

globals()["__builtins__"] = dict(vars(__import__("builtins")))  # of the functions below, whatever becomes of the module

TESTS = "/tests"
ALWAYS = (
    *("builtins", "collections", "contextlib", "functools", "operator", "re", "sys", "types", "unittest"),
    *("_pytest", "pluggy", "pytest", "traceback"),
)
"""Packages that judge, whatever the tests import."""
HOOKS = frozenset(
    (
        *("showwarning", "formatwarning", "_showwarnmsg_impl", "excepthook", "unraisablehook", "displayhook"),
        *("breakpointhook", "lastResort", "_create_default_https_context", "_logRecordFactory", "_loggerClass"),
        *("stdin", "stdout", "stderr", "path_hooks", "__loader__", "__spec__"),
    )
)
"""Names that honest code gives other values."""
DATA = (type(None), bool, int, float, str, bytes, tuple, list, dict, set, frozenset)

HARMLESS = ("assert", "parametrize", "len", "sorted", "zip", "enumerate", "range", "list", "str", "repr", "sum")
"""Beginnings of names of functions that change nothing that they are given."""

_body = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_flat = functools.partial(functools.reduce, operator.iadd)


class Seal:
    """Remembers what namespaces held, and says whether it still is what they hold."""

    def __init__(self) -> None:
        self._held: list[tuple[Namespace, tuple[str, ...], tuple[object, ...]]] = []
        self._closed: list[tuple[Namespace, frozenset[str]]] = []
        self._functions: list[Any] = []
        self._bodies: list[object] = []
        self._cells: list[tuple[types.CellType, object]] = []
        self._seen: set[int] = set()

    def add(self, namespace: Namespace, but: Iterable[str] = (), skipped: tuple[type, ...] = DATA) -> None:
        """Watch the values that are no data, without the names ``but``."""
        kept = {
            name: value
            for name, value in list(namespace.items())
            if type(value) not in skipped and name not in but and name not in HOOKS
        }
        self._held.append((namespace, tuple(kept), tuple(kept.values())))
        for value in kept.values():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            for one in (function.fget, function.fset) if isinstance(function, property) else (function,):
                if isinstance(one, types.FunctionType) and id(one) not in self._seen:
                    self._seen.add(id(one))
                    self._functions.append(one)
                    self._bodies += _body(one)
                    for cell in one.__closure__ or ():
                        with contextlib.suppress(ValueError):  # empty yet
                            self._cells.append((cell, cell.cell_contents))

    def add_class(self, cls: type, closed: bool = False) -> None:
        """Watch a class; in a closed one a new special name is a change too."""
        if id(cls) not in self._seen:
            self._seen.add(id(cls))
            self.add(vars(cls), skipped=(type(None), bool, int, float, str, bytes, tuple))
            if closed:
                self._closed.append((vars(cls), frozenset(vars(cls))))

    def add_module(self, module: types.ModuleType, skipped: tuple[type, ...] = DATA) -> None:
        """Watch it with its classes."""
        names = vars(module)
        self.add(names, skipped=skipped)
        for cls in list(names.values()):
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                self.add_class(cls)

    def check(self) -> None:
        if sys.gettrace() is not None or sys.getprofile() is not None:
            raise Tampered("a trace function was set")
        for namespace, names, values in self._held:
            if not all(map(operator.is_, map(namespace.get, names), values)):
                changed = next(
                    name for name, value in zip(names, values, strict=True) if namespace.get(name) is not value
                )
                raise Tampered(f"changed {changed}")
        if not all(map(operator.is_, _flat(map(_body, self._functions), []), self._bodies)):
            raise Tampered("a function has another body")
        for cell, content in self._cells:
            try:
                if cell.cell_contents is not content:
                    raise Tampered("a function has another closure")
            except ValueError as error:
                raise Tampered("a function has an empty closure") from error
        for namespace, known in self._closed:
            for name in namespace.keys() - known:
                if name.startswith("__") or name.startswith("assert"):
                    raise Tampered(f"added {name}")


class TestFiles:
    """What test files import from the standard library and from each other, and what constants they hold."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.trees: dict[str, ast.Module] = {}
        self.imports: dict[str, str] = {}  # module -> where the tests hold it
        self.words = ""
        self.rebound: set[str] = set()
        self._changed: set[str] = set()
        waiting = list(paths)
        while waiting:
            path = waiting.pop()
            if path in self.trees or not os.path.isfile(path):
                continue
            try:
                with open(path, "rb") as file:
                    source = file.read()
                self.trees[path] = tree = ast.parse(source, path)
            except (OSError, ValueError, SyntaxError, RecursionError):
                continue
            self.words += source.decode(errors="replace")
            _find_changes(tree, self.rebound, self._changed)
            directory = os.path.dirname(path)
            places = [TESTS] if os.path.exists(f"{directory}/__init__.py") else [TESTS, directory]
            for name in _imported(tree, directory):
                is_own = name.split(".")[0] not in sys.stdlib_module_names
                for place in [f"{place}/{name.replace('.', '/')}" for place in places if is_own]:
                    for file_name in (f"{place}.py", f"{place}/__init__.py"):
                        if os.path.isfile(file_name):
                            self.imports[name] = file_name
                            waiting.append(file_name)
                self.imports.setdefault(name, "")

    def import_standard_library(self) -> None:
        for name in sorted(self.imports):
            if name.split(".")[0] in sys.stdlib_module_names - {"antigravity", "this", "__main__", "idlelib", "test"}:
                try:
                    importlib.import_module(name)
                except Exception:
                    continue  # an attribute, or what this machine lacks

    def seal(self) -> Seal:
        """Seal what tests are judged with; nothing of the task or the attempt may be loaded."""
        seal = Seal()
        tops = {name.split(".")[0] for name in self.imports}.union(ALWAYS)
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and name.split(".")[0] in tops:
                seal.add_module(module)
        seal.add(sys.modules)
        return seal

    def seal_loaded(self, seal: Seal, loaded: Mapping[str, types.ModuleType], loaders: set[type]) -> list[Constant]:
        """Watch what the test files that are ``loaded`` define; returns what their constants are. ``loaders`` load from
        where the tests are."""

        def is_of_tests(module: types.ModuleType) -> bool:
            by_loader = type(vars(module).get("__loader__")) in loaders and module.__file__ in self.trees
            return by_loader or any(module is one for one in loaded.values())

        for name, path in self.imports.items():
            if path and name in sys.modules and not is_of_tests(sys.modules[name]):
                raise Tampered(f"{name} was not loaded from the tests")
        rebound, changed = self.rebound, self._changed
        constants: list[Constant] = []
        for path, module in loaded.items():
            body, names = self.trees[path].body if path in self.trees else [], vars(module)
            self._check_imports(body, names, rebound, is_of_tests)
            constants += _constants(body, names, rebound, changed)
            seal.add(names, rebound)
            for node in body:
                if isinstance(node, ast.ClassDef) and isinstance(cls := names.get(node.name), type):
                    found = _constants(node.body, vars(cls), rebound, changed)
                    constants += [one for one in found if type(vars(cls)[one[1]]) is type(one[2])]  # no enumeration
                    seal.add(vars(cls), rebound)
        return constants

    def _check_imports(
        self,
        body: list[ast.stmt],
        names: Namespace,
        rebound: set[str],
        is_of_tests: Callable[[types.ModuleType], bool],
    ) -> None:
        bound: dict[str, list[object]] = {}
        for node in body:
            if isinstance(node, ast.Import):
                for one in node.names:
                    module = one.name if one.asname else one.name.split(".")[0]
                    value = sys.modules.get(module) if self._is_standard(module) else None
                    bound.setdefault(one.asname or module, []).append(value)
            elif isinstance(node, ast.ImportFrom) and not node.level and self._is_standard(node.module or ""):
                for one in node.names:
                    value = vars(sys.modules[node.module or ""]).get(one.name)
                    bound.setdefault(one.asname or one.name, []).append(value)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound.setdefault(node.name, []).append(None)
        for name, values in bound.items():
            is_watched = len(values) == 1 and name not in rebound and type(values[0]) not in DATA
            found = names.get(name)
            is_own = isinstance(found, types.ModuleType) and is_of_tests(found)  # a package's part of that name
            if is_watched and found is not values[0] and not is_own:
                raise Tampered(f"{name} of the tests is not what they import")

    @staticmethod
    def _is_standard(name: str) -> bool:
        return name in sys.modules and name.split(".")[0] in (*sys.stdlib_module_names, "pytest")


def check_constants(constants: Iterable[Constant]) -> None:
    for namespace, name, value in constants:
        if not same(namespace.get(name), value):
            raise Tampered(f"{name} of the tests was changed")


def same(value: Any, other: Any) -> bool:
    """Whether two values made of plain data are equal, types included."""
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return same(list(value.items()), list(other.items()))
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other) or value != value


def _imported(tree: ast.Module, directory: str) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = os.path.relpath(directory, TESTS).split("/") if node.level else []
            parts = [part for part in parts[: len(parts) - node.level + 1] if part != "."]
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from [one for one in (base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)) if one]


def _find_changes(tree: ast.Module, rebound: set[str], changed: set[str]) -> None:
    """Names that the tests themselves may give other values once they are loaded, or whose values they may change."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            rebound.update(node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            rebound.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.add(_last_name(node.value))
        elif isinstance(node, ast.AugAssign):
            changed.add(_last_name(node.target))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                changed.add(_last_name(node.func.value))
            if not _last_name(node.func).startswith(HARMLESS):
                changed.update(map(_last_name, (*node.args, *(one.value for one in node.keywords))))


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _constants(body: list[ast.stmt], names: Namespace, rebound: set[str], changed: set[str]) -> list[Constant]:
    """What is assigned once, as a literal."""
    targets: dict[str, list[ast.expr | None]] = {}
    for node in body:
        inner = () if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) else ast.walk(node)
        for one in inner:
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store | ast.Del):
                targets.setdefault(one.id, []).append(None)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            targets[node.targets[0].id][-1] = node.value
    found: list[Constant] = []
    for name, values in targets.items():
        if len(values) == 1 and values[0] is not None and name in names and name not in rebound:
            try:
                value = ast.literal_eval(values[0])
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            if name not in changed or isinstance(value, int | float | str | bytes):
                found.append((names, name, value))
    return found
