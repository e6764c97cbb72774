"""Runs named unittest tests against untrusted code and writes one secret per passed test. It runs *inside* a sandbox.

In: ``/logs/verifier/expected``, a line ``secret test_id`` for every expected test and a last line ``secret -``; the
test modules under ``/tests``; the code under test in ``/work``. Out: ``/logs/verifier/results``, where a passed test
appends its secret, any other outcome a line ``! test_id outcome message``, and an orderly end the last secret.

Started as ``python3 -I -S -E -B``: no site-packages, no ``sitecustomize``, no ``.pth``, no environment. ``/work`` comes
last on ``sys.path``, so that nothing in it shadows the standard library or the tests. The secrets are read, and their
file is removed, before any of the code under test is loaded. Only the standard library is imported here.
"""

import builtins
import collections
import decimal
import enum
import fractions
import functools
import os
import pathlib
import sys
import traceback
import types
import unittest
import unittest.case
import unittest.result
from collections.abc import Callable, Mapping
from typing import Any

TESTS = "/tests"
WORK = "/work"
EXPECTED = "/logs/verifier/expected"
RESULTS = "/logs/verifier/results"
END = "-"
MAX_MESSAGE_CHARS = 400
TRUSTED_MODULES = (unittest.case, unittest.result)

COMPARISONS = tuple(
    f"assert{name}"
    for name in (
        *("Equal", "NotEqual", "AlmostEqual", "NotAlmostEqual", "Less", "LessEqual", "Greater", "GreaterEqual"),
        *("In", "NotIn", "CountEqual", "SequenceEqual", "ListEqual", "TupleEqual", "SetEqual", "DictEqual"),
        "MultiLineEqual",
    )
)
DECISIVE = frozenset(
    f"__{name}__"
    for name in (
        *("eq", "ne", "lt", "le", "gt", "ge", "hash", "contains", "iter", "len", "getitem"),
        *("sub", "rsub", "abs", "round"),
    )
)
"""Methods that those assertions ask."""

SCALARS = {id(cls) for cls in (int, float, complex, bool, str, bytes, bytearray, range, type(None))}
CONTAINERS: tuple[type, ...] = (
    *(list, tuple, set, frozenset, collections.deque),
    *(type({}.keys()), type({}.values()), type({}.items())),
)
STANDARD = {
    base
    for cls in (collections.Counter, decimal.Decimal, enum.Flag, fractions.Fraction, pathlib.PosixPath)
    for base in cls.__mro__
}
TRUSTED = SCALARS | {id(cls) for cls in (object, dict, collections.OrderedDict, *CONTAINERS, *STANDARD)}

mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
names_of: Callable[[type], Mapping[str, object]] = type.__dict__["__dict__"].__get__

Namespace = Mapping[str, object]


class Tampered(Exception):
    """The code under test changed the machinery that judges it."""


def foreign_classes(value: object) -> dict[int, type]:
    """The classes, by ``id``, of ``value`` and of what it holds whose instances decide for themselves what they equal.

    Asks the classes' own C slots: no method of a value or of a metaclass runs here.
    """
    found: dict[int, type] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        cls = type(value)
        if id(cls) in SCALARS or id(value) in seen:
            continue
        seen.add(id(value))
        bases = mro_of(cls)
        if any(id(base) not in TRUSTED and not DECISIVE.isdisjoint(names_of(base)) for base in bases):
            found[id(cls)] = cls
        for base in bases:
            if base is dict:
                waiting += (*dict.keys(value), *dict.values(value))  # type: ignore[arg-type]
            elif any(base is container for container in CONTAINERS):
                waiting += base.__iter__(value)  # type: ignore[attr-defined]
    return found


def strict(original: Callable[..., None]) -> Callable[..., None]:
    """An assertion that compares its first two arguments, unless a class that only one of them holds would decide."""

    @functools.wraps(original)
    def assertion(self: unittest.TestCase, *values: object, **more: object) -> None:
        if original.__name__ == "assertCountEqual":
            values = (*(list(value) for value in values[:2]), *values[2:])  # type: ignore[call-overload]
        first, second = (foreign_classes(value) for value in (*values, *more.values())[:2])
        if first.keys() != second.keys():
            liar = next(iter({**first, **second}.values()))
            self.fail(f"the comparison was left to {type.__repr__(liar)}, a class that only one side holds")
        original(self, *values, **more)

    return assertion


class Seal:
    """Remembers what namespaces held, and says whether it still is what they hold."""

    def __init__(self) -> None:
        self._held: list[tuple[Namespace, set[str] | None, dict[str, tuple[object, object]]]] = []

    def add(self, namespace: Namespace, closed: bool, kinds: type | tuple[type, ...] = object) -> None:
        """Watch the values of type ``kinds``; in a closed namespace a new name is a change too."""
        kept = {name: (value, self._body(value)) for name, value in namespace.items() if isinstance(value, kinds)}
        self._held.append((namespace, set(namespace) if closed else None, kept))

    def add_class(self, cls: type) -> None:
        self.add(vars(cls), closed=True)

    def check(self) -> None:
        if sys.gettrace() is not None or sys.getprofile() is not None:
            raise Tampered("a trace function was set")
        for namespace, names, kept in self._held:
            if names is not None and set(namespace) - names:
                raise Tampered(f"added {sorted(set(namespace) - names)[0]}")
            for name, (value, body) in kept.items():
                if namespace.get(name) is not value or self._body(value) != body:
                    raise Tampered(f"changed {name}")

    @staticmethod
    def _body(value: object) -> object:
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if not isinstance(value, types.FunctionType):
            return None
        return id(value.__code__), id(value.__defaults__), id(value.__kwdefaults__), id(value.__closure__)


class Channel:
    """Hands secrets back; the host reads them from the file."""

    def __init__(self, secrets: dict[str, str], descriptor: int) -> None:
        self._secrets = secrets
        self._descriptor = descriptor

    def is_expected(self, test_id: str) -> bool:
        return test_id in self._secrets

    def passed(self, test_id: str) -> None:
        """``END`` for the whole run; a test that is not expected has no secret."""
        if test_id in self._secrets:
            self._write(self._secrets.pop(test_id))

    def note(self, test_id: str, outcome: str, message: str) -> None:
        """For people."""
        self._write(f"! {test_id} {outcome} {str(message)[-MAX_MESSAGE_CHARS:]!a}")

    def _write(self, line: str) -> None:
        os.write(self._descriptor, (line + "\n").encode())


class Results(unittest.TestResult):
    """Hands an expected test's secret back once it has passed with the seal unbroken before and after."""

    def __init__(self, channel: Channel, seal: Seal) -> None:
        super().__init__()
        self._channel = channel
        self._seal = seal
        self.note = channel.note
        self._passed: set[str] = set()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._seal.check()

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._passed.add(test.id())

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test.id(), "error", traceback_of(err))

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test.id(), "failed", traceback_of(err))

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note(test.id(), "skipped", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test.id(), "expected-failure", "")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self.note(test.id(), "unexpected-success", "")

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.note(test.id(), "failed", traceback_of(err))

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._seal.check()
        if any(callable(getattr(unittest.TestCase, name, None)) for name in vars(test)):
            raise Tampered(f"a method of {test.id()} was replaced on the instance")
        if test.id() in self._passed:
            self._channel.passed(test.id())

    def end(self) -> None:
        self._seal.check()
        self._channel.passed(END)


def traceback_of(err: Any) -> str:
    return "".join(traceback.format_exception(*err))


def module_of(test_id: str) -> tuple[str, str]:
    """The longest dotted prefix of a test id that is a file under TESTS: (name, path)."""
    parts = test_id.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = os.path.join(TESTS, *parts[:length]) + ".py"
        if os.path.isfile(path):
            return ".".join(parts[:length]), path
    raise LookupError(f"no file under {TESTS} holds {test_id}")


def load_module(name: str, path: str) -> types.ModuleType:
    """Execute a test module from its source; it never comes from a cache or from WORK."""
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    module = types.ModuleType(name)
    module.__file__ = path
    module.__package__ = name.rpartition(".")[0]  # for imports relative to the tests
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module


def load_tests(test_ids: list[str], results: Results, seal: Seal) -> unittest.TestSuite:
    """A suite of every expected test that can be loaded; the others are noted."""
    suite = unittest.TestSuite()
    modules: dict[str, types.ModuleType] = {}
    classes: set[type] = set()
    for test_id in test_ids:
        try:
            name, path = module_of(test_id)
            if name not in modules:
                modules[name] = load_module(name, path)
                seal.add(vars(modules[name]), closed=False, kinds=(types.FunctionType, type))
            class_name, method = test_id[len(name) + 1 :].split(".")
            cls = getattr(modules[name], class_name)
            if not issubclass(cls, unittest.TestCase):
                raise TypeError(f"{class_name} is not a unittest.TestCase")
            for base in cls.__mro__:
                if base not in classes and base.__module__ in modules:
                    classes.add(base)
                    seal.add(vars(base), closed=False, kinds=(types.FunctionType, classmethod, staticmethod))
            suite.addTest(cls(method))
        except Tampered:
            raise
        except BaseException as error:  # whatever the code under test raises, SystemExit too, is this test's failure
            results.note(test_id, "not-loaded", repr(error))
    if len(sys._current_frames()) > 1:
        raise Tampered("a thread was started while the tests were loaded")
    return suite


def take_secrets() -> tuple[dict[str, str], int]:
    """The secret of every expected test, and where those of passed tests are written; nobody can read them again."""
    with open(EXPECTED) as file:
        secrets = {test_id: secret for secret, test_id in (line.split() for line in file)}
    channel = os.open(RESULTS, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    os.unlink(EXPECTED)
    # The code under test must not find the runner by name.
    sys.modules["__main__"] = types.ModuleType("__main__")
    return secrets, channel


def sealed() -> Seal:
    """Make unittest's assertions strict, then watch what judges the tests."""
    for name in COMPARISONS:
        setattr(unittest.TestCase, name, strict(getattr(unittest.TestCase, name)))
    seal = Seal()
    for cls in STANDARD:
        seal.add_class(cls)
    for module in (builtins, *TRUSTED_MODULES):
        seal.add(vars(module), closed=False)
    seal.add(sys.modules, closed=False, kinds=types.ModuleType)
    for cls in {value for module in TRUSTED_MODULES for value in vars(module).values() if isinstance(value, type)}:
        if cls.__module__ in ("unittest.case", "unittest.result"):
            seal.add_class(cls)
    return seal


def main() -> None:
    secrets, descriptor = take_secrets()
    sys.path += [TESTS, WORK]
    seal = sealed()
    for cls in (Channel, Results):
        seal.add_class(cls)
    expected = [test_id for test_id in secrets if test_id != END]
    results = Results(Channel(secrets, descriptor), seal)
    try:
        load_tests(expected, results, seal).run(results)
        results.end()
    except BaseException as error:
        results.note(END, "ended-early", repr(error))
        os._exit(1)
    # Nothing the code under test registered may run now.
    os._exit(0)


if __name__ == "__main__":
    main()
