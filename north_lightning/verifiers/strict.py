"""Comparisons that are no matter of trust. It runs *inside* a sandbox.

In: what a test compares. Out: the answer of Python, unless a class that the code under test brought along decides, on
one side alone, that two values are equal, ordered or contained. Such a class must be right more than once: the same
question is asked several times, among questions about other values (decoys), in an order that nobody knows. What calls
most decoys equal too, or answers now this and now that, is no answer, and the test fails. A class that the tests
define decides as ever.

``Strict`` rewrites the comparisons of test files and their helpers to ask here; ``seal_assertions`` does it for the
assertions of unittest, and for what mocks were called with.
"""

from __future__ import annotations

import ast
import builtins
import collections
import functools
import operator
import os
import sys
import types
import unittest
import unittest.case
import weakref
from collections.abc import Callable, Iterable, Mapping

TYPE_CHECKING = False  # typing takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

globals()["__builtins__"] = dict(vars(__import__("builtins")))  # of the functions below, whatever becomes of the module

PREFIX = "@" + os.urandom(4).hex()  # no name that source text could hold, or code could know
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
BY_NAME = {kind.__name__: function for kind, function in OPERATORS.items()}
TURNED = {"Lt": "Gt", "Gt": "Lt", "LtE": "GtE", "GtE": "LtE"}
TRUE_OF = {"Eq": (0, 0), "NotEq": (0, 1), "Lt": (0, 1), "LtE": (0, 0), "Gt": (1, 0), "GtE": (0, 0)}
FALSE_OF = {"Eq": (0, 1), "NotEq": (0, 0), "Lt": (1, 0), "LtE": (1, 0), "Gt": (0, 1), "GtE": (0, 1)}
DECISIVE = frozenset(
    f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "hash", "contains", "iter", "len", "getitem")
) | {"__sub__", "__rsub__", "__abs__", "__round__", "__float__"}
"""Methods that comparisons and assertions ask."""

SCALARS = frozenset(id(cls) for cls in (int, float, complex, bool, str, bytes, bytearray, range, type(None)))
CONTAINERS: tuple[type, ...] = (
    *(list, tuple, set, frozenset, collections.deque),
    *(type({}.keys()), type({}.values()), type({}.items())),
)
DELEGATING = (types.MappingProxyType, weakref.ref, weakref.ProxyType, weakref.CallableProxyType, types.GenericAlias)
REPEATS, NUM_DECOYS = 3, 6

mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
names_of: Callable[[type], Mapping[str, object]] = type.__dict__["__dict__"].__get__

trusted: frozenset[int] = frozenset()
"""Ids of classes of the standard library, whose answers count."""
of_tests: dict[int, object] = {}
"""Code and classes of test files, by id: they may decide what they like."""


class TestsAny:
    """What ``mock.ANY`` is where a test writes it; the code under test gets mock's own, which nobody believes."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "<ANY>"


ANY = TestsAny()


def trust_standard_library() -> None:
    """Every class that is loaded now; what the code under test can make of one is not among them."""
    global trusted
    found = {TestsAny, *CONTAINERS}
    for name, module in list(sys.modules.items()):
        is_standard = name.split(".")[0] in sys.stdlib_module_names and name != "unittest.mock"
        for cls in list(vars(module).values()) if is_standard else ():
            if isinstance(cls, type) and cls not in found:
                found.update(mro_of(cls))
    if mock := sys.modules.get("unittest.mock"):
        found.add(vars(mock)["_Call"])
    trusted = frozenset(id(cls) for cls in found if cls not in DELEGATING)


def own(value: object) -> object:
    """``value``, which a test wrote as ``ANY`` or ``approx``."""
    mock, pytest = sys.modules.get("unittest.mock"), sys.modules.get("pytest")
    if mock is not None and value is vars(mock).get("ANY"):
        return ANY
    return _approx if pytest is not None and value is vars(pytest).get("approx") else value


def _approx(*arguments: Any, **more: Any) -> Any:
    value = vars(sys.modules["pytest"])["approx"](*arguments, **more)
    of_tests[id(value)] = value
    return value


def foreign_classes(value: object) -> dict[int, type]:
    """The classes, by ``id``, of ``value`` and of what it holds whose instances decide for themselves what they equal.

    Asks the classes' own C slots: no method of a value or of a metaclass runs here.
    """
    if id(type(value)) in SCALARS:
        return {}
    found: dict[int, type] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        cls = type(value)
        if id(cls) in SCALARS or id(value) in seen:
            continue
        seen.add(id(value))
        if of_tests.get(id(value)) is value:
            waiting += _attributes(value)
            continue
        bases = mro_of(cls)
        if any(id(base) not in trusted and _decides(base) for base in bases):
            found[id(cls)] = cls
        for base in bases:
            if base is dict:
                waiting += (*dict.keys(value), *dict.values(value))  # type: ignore[arg-type]
            elif base in CONTAINERS:
                waiting += base.__iter__(value)  # type: ignore[attr-defined]
        if cls.__dictoffset__ if type(cls) is type else id(cls) in trusted:
            waiting += _attributes(value)
    return found


def _decides(cls: type) -> bool:
    if any(cls is one for one in DELEGATING):
        return True
    names = names_of(cls)
    methods = [names[name] for name in DECISIVE & names.keys()] if of_tests.get(id(cls)) is not cls else []
    codes = [getattr(method, "__code__", method) for method in methods if method is not None]
    return any(code is not of_tests.get(id(code)) for code in codes)


def _attributes(value: object) -> Iterable[object]:
    try:
        return tuple(object.__getattribute__(value, "__dict__").values())
    except (AttributeError, TypeError):
        return ()


def suspects(left: object, right: object) -> tuple[bool, bool]:
    """Whether ``left``, and ``right``, hold a class that decides and that the other does not hold."""
    first, second = foreign_classes(left), foreign_classes(right)
    return bool(first.keys() - second.keys()), bool(second.keys() - first.keys())


def decoy(value: Any, number: int) -> Any:
    """Something like ``value`` that is not equal to it; 6 different ones."""
    cls = type(value)
    if cls is bool:
        return not value
    if cls in (int, float, complex):
        if value - value != 0:  # not finite
            return (0.0, 1.0, -1.5, 2.0, -3.0, 1e9)[number]
        return value + (1, -1, 2, 10**6 + os.urandom(1)[0], -(10**7) - os.urandom(1)[0], 7)[number]
    if cls is str:
        return (value + "x", value[:-1] if value else "y", "q" + value, os.urandom(8).hex(), value * 2 + "1", "0")[
            number
        ]
    if cls in (bytes, bytearray):
        return cls((value + b"x", value[:-1] or b"yy", b"q" + value, os.urandom(8), value * 2 + b"1", b"0z")[number])
    if value is ANY:
        return value
    if of_tests.get(id(value)) is value:  # approximately something
        copy: Any = object.__new__(cls)
        vars(copy).update(vars(value), expected=decoy(vars(value)["expected"], number))
        return copy
    if cls is dict or cls is collections.OrderedDict:
        return cls({key: decoy(one, number) for key, one in value.items()} or {number: number})
    if cls in CONTAINERS[:5]:
        return cls([decoy(one, number) for one in value] or [number])
    if isinstance(value, tuple) and id(cls) in trusted:
        return tuple.__new__(cls, [decoy(one, number) for one in value])
    if id(cls) in trusted and hasattr(cls, "__add__") and not isinstance(value, type):
        try:
            return value + (1, -1, 2, 1000, -1000, 7)[number]
        except Exception:
            pass
    return (object(), None, "none", 0, (), os.urandom(4).hex())[number]


def confirmed(ask: Callable[[Any], Any], value: Any, far: bool = False) -> bool:
    """Whether ``ask`` says yes to ``value`` each time, and no to at least half of the decoys; ``far``: to numbers that
    are nowhere near."""
    others = [other for other in (decoy(value, number) for number in range(NUM_DECOYS)) if other is not value]
    if far and type(value) in (int, float):
        others = [value + sign * int.from_bytes(os.urandom(7), "big") for sign in (1, -1) for _ in range(REPEATS)]
    asked = sorted([(value, True)] * REPEATS + [(other, False) for other in others], key=lambda _: os.urandom(4))
    num_denied = 0
    for one, expected in asked:
        try:
            answer = bool(ask(one))
        except Exception:
            answer = False
        if expected and not answer:
            return False
        num_denied += not expected and not answer
    return not others or 2 * num_denied >= len(others)


def compare(name: str, left: Any, right: Any) -> Any:
    """``left <name> right``; an ``AssertionError`` if that is left to a class that lies."""
    function = BY_NAME[name]
    if (id(type(left)) in SCALARS and id(type(right)) in SCALARS) or name in ("Is", "IsNot"):
        return function(left, right)
    if name in ("In", "NotIn") and isinstance(right, types.GeneratorType | map | filter | zip | type(iter([]))):
        found = any(compare("Eq", one, left) for one in right)
        return found if name == "In" else not found
    odd = suspects(left, right)
    answer = function(left, right)
    if not any(odd):
        return answer
    check(name, left, right, odd, answer)
    return answer


def check(name: str, left: Any, right: Any, odd: tuple[bool, bool], answer: object) -> None:
    function = BY_NAME[name]
    if name in TURNED:
        if (
            answer
            and function(right, left)
            and not (name in ("LtE", "GtE") and confirmed(lambda one: one == left, right))
        ):
            raise AssertionError(f"{_name(left, right, odd)} is both more and less than another value")
        return
    if bool(answer) is not (name in ("Eq", "In")) or (name in ("In", "NotIn") and type(right) in (str, bytes)):
        return
    if name in ("Eq", "NotEq"):
        good = are_believable(odd_pairs(left, right))
    elif type(right) in CONTAINERS or type(right) is dict:
        good = are_believable((left, one) for one in right if left is not one and left == one)
    else:
        fits = (lambda one: one in right) if name == "In" else (lambda one: not function(one, right))
        good = confirmed(fits, left, far=True)
    if not good:
        raise AssertionError(
            f"the comparison was left to {_name(left, right, odd)}, which calls other values equal too"
        )


def odd_pairs(left: Any, right: Any) -> Iterable[tuple[Any, Any]]:
    """What is compared in the end where a class decides that only one of two equal values holds."""
    waiting = [(left, right)]
    while waiting:
        left, right = waiting.pop()
        cls = type(left)
        if (id(cls) in SCALARS and id(type(right)) in SCALARS) or not any(suspects(left, right)):
            continue
        if cls is type(right) and cls.__name__ == "_Call" and id(cls) in trusted:
            waiting += zip(tuple(left)[-2:], tuple(right)[-2:], strict=True)
        elif cls is type(right) and cls in (list, tuple, collections.deque) and len(left) == len(right):
            waiting += zip(left, right, strict=True)
        elif cls is type(right) is dict and not any(foreign_classes(key) for key in (*left, *right)):
            waiting += ((left[key], right[key]) for key in left if key in right)
        else:
            yield left, right


def are_believable(pairs: Iterable[tuple[Any, Any]]) -> bool:
    def is_believable(left: Any, right: Any) -> bool:
        if suspects(left, right)[1]:
            return confirmed(lambda one: one == right, left)
        return confirmed(lambda one: left == one, right)

    return all(is_believable(*one) for one in pairs)


def _name(left: object, right: object, odd: tuple[bool, bool]) -> str:
    return type.__repr__(type(right if odd[1] else left))


class Shown(int):
    """Stands for a value whose comparison is decided; looks like it."""

    value: object

    def __new__(cls, number: int, value: object) -> Shown:
        one = super().__new__(cls, number)
        one.value = value
        return one

    def __repr__(self) -> str:
        return repr(self.value)


def pair(name: str, left: Any, right: Any) -> tuple[Any, Any]:
    """Two values that compare as these do, and look like them in a message."""
    if id(type(left)) in SCALARS and id(type(right)) in SCALARS:
        return left, right
    if name in ("In", "NotIn"):
        if not any(suspects(left, right)) and not isinstance(right, types.GeneratorType | map | filter | zip):
            return left, right
        answer = compare(name, left, right)
        return Shown(0, left), [0] if bool(answer) is (name == "In") else []
    if not any(suspects(left, right)):
        return left, right
    numbers = (TRUE_OF if compare(name, left, right) else FALSE_OF)[name]
    return Shown(numbers[0], left), Shown(numbers[1], right)


def chain(names: str, *values: Any) -> Any:
    """``a < b <= c``; every value is there already."""
    answer: Any = True
    for name, left, right in zip(names.split(), values, values[1:], strict=False):
        answer = compare(name, left, right)
        if not answer:
            return answer
    return answer


class Strict(ast.NodeTransformer):
    """Makes a test file ask ``compare``; where pytest shows both sides of an assert, ``pair``."""

    def __init__(self, shows_sides: bool) -> None:
        self._shows_sides = shows_sides
        self._is_asserted = False
        self._num_names = 0

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        before = self._num_names
        self._is_asserted = self._shows_sides
        node.test = self.visit(node.test)
        self._is_asserted = False
        if node.msg is not None:
            node.msg = self.visit(node.msg)
        names: list[ast.expr] = [ast.Name(f"{PREFIX}{n}", ast.Store()) for n in range(before, self._num_names)]
        return [node, ast.Assign(names, ast.Constant(None))] if names else [node]  # nothing lives longer for it

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        is_asserted = self._is_asserted
        self.generic_visit(node)
        names = [type(one).__name__ for one in node.ops]
        if all(name in ("Is", "IsNot") for name in names):
            return node
        values = [node.left, *node.comparators]
        if len(names) > 1:
            return _call("chain", ast.Constant(" ".join(names)), *values)
        if not is_asserted:
            return _call("compare", ast.Constant(names[0]), *values)
        name = f"{PREFIX}{self._num_names}"
        self._num_names += 1
        both = ast.NamedExpr(ast.Name(name, ast.Store()), _call("pair", ast.Constant(names[0]), *values))
        return ast.Compare(
            ast.Subscript(both, ast.Constant(0), ast.Load()), node.ops,
            [ast.Subscript(ast.Name(name, ast.Load()), ast.Constant(1), ast.Load())],
        )  # fmt: skip

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _call("own", node) if node.id in ("ANY", "approx") and isinstance(node.ctx, ast.Load) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return _call("own", node) if node.attr in ("ANY", "approx") and isinstance(node.ctx, ast.Load) else node

    def visit_match_case(self, node: ast.match_case) -> ast.match_case:
        self.generic_visit(node)
        if isinstance(node.pattern, ast.MatchValue):
            name = f"{PREFIX}{self._num_names}"
            self._num_names += 1
            asks = _call("compare", ast.Constant("Eq"), ast.Name(name, ast.Load()), node.pattern.value)
            node.guard = asks if node.guard is None else ast.BoolOp(ast.And(), [asks, node.guard])
            node.pattern = ast.MatchAs(None, name)
        return node

    def _in_its_own_scope(self, node: ast.AST) -> ast.AST:
        before, self._is_asserted = self._is_asserted, False  # a name bound in here would be bound elsewhere too
        self.generic_visit(node)
        self._is_asserted = before
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda = _in_its_own_scope


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(f"{PREFIX}{name}", ast.Load()), list(arguments), [])


def make_strict(tree: ast.Module, shows_sides: bool = False) -> ast.Module:
    Strict(shows_sides).visit(tree)
    ast.fix_missing_locations(tree)
    return tree


def compiled(source: bytes | ast.Module, path: str) -> types.CodeType:
    """A test file's code, which asks here."""
    code: types.CodeType = compile(make_strict(ast.parse(source, path)), path, "exec", dont_inherit=True)
    belongs_to_tests(code)
    return code


def belongs_to_tests(code: types.CodeType) -> None:
    of_tests[id(code)] = code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            belongs_to_tests(one)


def is_of_tests(function: object) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and of_tests.get(id(code)) is code


def strict(original: Callable[..., None]) -> Callable[..., None]:
    """An assertion that compares its first two arguments, unless it is left to a class that lies."""
    name = original.__name__

    @functools.wraps(original)
    def assertion(self: unittest.TestCase, *values: Any, **more: Any) -> None:
        flat = [*values, *more.values()]
        if len(flat) < 2:
            return original(self, *values, **more)
        if name == "assertCountEqual":
            flat[:2] = [list(value) for value in flat[:2]]
        first, second = flat[:2]
        odd = suspects(first, second)

        def holds(first: object, second: object) -> bool:
            given = [first, second, *flat[2:]]
            try:
                original(self, *given[: len(values)], **dict(zip(more, given[len(values) :], strict=True)))
            except self.failureException:
                return False
            return True

        original(self, *flat[: len(values)], **dict(zip(more, flat[len(values) :], strict=True)))
        if not any(odd) or "Not" in name:
            return None
        if name in ("assertLess", "assertGreater", "assertLessEqual", "assertGreaterEqual"):
            good = not holds(second, first) or (name.endswith("Equal") and are_believable([(first, second)]))
        elif name == "assertCountEqual":
            good = are_believable(
                (one, other) for one in first for other in second if one is not other and one == other
            )
        elif name == "assertIn":
            return check("In", first, second, odd, True)
        elif name in ("assertAlmostEqual", "assertDictContainsSubset"):
            good = (
                confirmed(lambda one: holds(one, second), first)
                if odd[1]
                else confirmed(lambda one: holds(first, one), second)
            )
        else:
            good = are_believable(odd_pairs(first, second))
        if not good:
            self.fail(f"the comparison was left to {_name(first, second, odd)}, which calls other values equal too")
        return None

    return assertion


COMPARISONS = tuple(
    f"assert{name}"
    for name in (
        *("Equal", "NotEqual", "AlmostEqual", "NotAlmostEqual", "Less", "LessEqual", "Greater", "GreaterEqual"),
        *("In", "NotIn", "CountEqual", "SequenceEqual", "ListEqual", "TupleEqual", "SetEqual", "DictEqual"),
        *("MultiLineEqual", "DictContainsSubset"),
    )
)


def seal_assertions() -> None:
    """Make strict what unittest and mocks compare, and let test files ask."""
    case = unittest.TestCase
    for name in COMPARISONS:
        if hasattr(case, name):
            setattr(case, name, strict(getattr(case, name)))
    for name, value in list(vars(case).items()):  # assertEquals and others that only warn
        for cell in getattr(value, "__closure__", None) or () if name not in COMPARISONS else ():
            found = getattr(cell.cell_contents, "__name__", "")
            if found in COMPARISONS:
                cell.cell_contents = getattr(case, found)
    if mock := sys.modules.get("unittest.mock"):
        call = vars(mock)["_Call"]
        equal = call.__eq__
        call.__eq__ = lambda self, other: _calls_equal(equal, self, other)
    for function in (compare, pair, chain, own):
        setattr(builtins, f"{PREFIX}{function.__name__}", function)


def _calls_equal(equal: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
    answer = equal(first, second)
    return are_believable(odd_pairs(first, second)) if answer is True else answer
