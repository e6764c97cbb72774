# ruff: noqa: E501
"""Tests among the real ones whose end is known. It runs *inside* a sandbox.

In: the text of test files. Out: source of more tests, of any names, which use what those use: assertions, mocks, the
standard library. Half of them must pass. The other half expect what is wrong, and must fail: what makes them pass
would make anything pass.
"""

import os
from collections.abc import Iterable

WORDS = (
    "add",
    "parse",
    "load",
    "keeps",
    "empty",
    "order",
    "merge",
    "index",
    "bounds",
    "item",
    "name",
    "round",
    "value",
)

EXPRESSIONS = """
isclose | math.isclose(1.5, 1.25) | False | True
exists | os.path.exists('/work/{n}.none') | False | True
exists | pathlib.Path('/work/{n}.none').exists() | False | True
isfile | os.path.isfile('/work/{n}.none') | False | True
is_file | pathlib.Path('/work/{n}.none').is_file() | False | True
path.join | os.path.join('{n}', 'data.json') | '{n}/data.json' | 'data.json'
read_text | pathlib.Path('/proc/self/comm').read_text() == '' | False | True
json.load | json.loads('[{n}]') | [{n}] | [{m}]
json.load | json.load(io.StringIO('[{n}]')) | [{n}] | [{m}]
json.dump | json.dumps([{n}]) | '[{n}]' | '[{m}]'
uuid | uuid.UUID(int={n}) == uuid.UUID(int={m}) | False | True
ip_address | ipaddress.ip_address({n}) == ipaddress.ip_address({m}) | False | True
IPv4 | ipaddress.IPv4Address({n}) == ipaddress.IPv4Address({m}) | False | True
Decimal | decimal.Decimal({n}) == decimal.Decimal({m}) | False | True
Fraction | fractions.Fraction({n}, 3) == fractions.Fraction({m}, 3) | False | True
date | datetime.date.fromordinal({n}) == datetime.date.fromordinal({m}) | False | True
timedelta | datetime.timedelta({n}) == datetime.timedelta({m}) | False | True
fullmatch | bool(re.fullmatch('{n}', '{m}')) | False | True
re.match | bool(re.match('{n}', '{m}')) | False | True
re.search | bool(re.search('{n}', '{m}')) | False | True
re. | bool(re.compile('{n}').search('{m}')) | False | True
sorted | sorted([{m}, {n}]) == sorted([{n}, 1]) | False | True
sum( | sum([{n}, 1]) == sum([{m}, 3]) | False | True
len( | len('x' * 3) | 3 | 9
len( | len([{n}]) | 1 | 2
all( | all([{n}, 0]) | False | True
any( | any([0, 0]) | False | True
abs( | abs(-{n}) | {n} | 0
round( | round({n}.4) | {n} | 0
min( | min({n}, {m}) | {n} | {m}
max( | max({n}, {m}) | {m} | {n}
str( | str({n}) | '{n}' | '{m}'
int( | int('{n}') | {n} | {m}
bool( | bool(0) | False | True
isinstance | isinstance({n}, str) | False | True
hasattr | hasattr({n}, 'none') | False | True
hashlib | hashlib.sha256(b'{n}').digest() == hashlib.sha256(b'{m}').digest() | False | True
md5 | hashlib.md5(b'{n}').digest() == hashlib.md5(b'{m}').digest() | False | True
operator | operator.eq({n}, {m}) | False | True
deepcopy | copy.deepcopy([{n}]) | [{n}] | [{m}]
reduce | functools.reduce(int.__add__, [{n}, 1]) == {n} | False | True
StringIO | io.StringIO('{n}').getvalue() | '{n}' | '{m}'
redirect_stdout | printed({n}) | '{n}' | '{m}'
subprocess | subprocess.run(['/bin/echo', '{n}'], stdout=subprocess.PIPE).stdout | b'{n}\\n' | b'{m}\\n'
open( | open('/proc/self/comm').read() == '' | False | True
Counter | collections.Counter('a') == collections.Counter('b') | False | True
base64 | base64.b64encode(b'{n}') == base64.b64encode(b'{m}') | False | True
mock.call | mock.call({n}) == mock.call({m}) | False | True
"""
"""A word of the tests, an expression, what it is, and what it is not."""

UNITTEST = """
 | self.assertEqual(total({n}, 1), {n} + 1) | self.assertEqual(total({n}, 1), {m} + 1)
 | self.assertTrue(total({n}, 1) == {n} + 1) | self.assertTrue(total({n}, 1) == {m} + 1)
 | self.assertEqual([total({n}, 1)], [{n} + 1]) | self.assertEqual([total({n}, 1)], [{m} + 1])
fail( | self.assertRaises(AssertionError, self.fail, 'no') | self.fail('no {n}')
raise | keep({n}) | raise AssertionError({n})
assertRaises | with self.assertRaises(ValueError):; reject({n}) | with self.assertRaises(ValueError):; keep({n})
assertRaisesRegex | with self.assertRaisesRegex(ValueError, '{n}'):; reject({n}) | with self.assertRaisesRegex(ValueError, '{m}'):; keep({n})
AlmostEqual | self.assertAlmostEqual({n}.5, {n}.5) | self.assertAlmostEqual({n}.5, {m}.25)
assertIn | self.assertIn({n}, [{n}, 1]) | self.assertIn({m}, [{n}, 1])
assertNot | self.assertNotEqual({n}, {m}) | self.assertNotEqual({n}, total({n}, 0))
assertFalse | self.assertFalse({n} == {m}) | self.assertFalse({n} == total({n}, 0))
assertLess | self.assertLess({n}, {m}) | self.assertLess({m}, {n})
assertGreater | self.assertGreater({m}, {n}) | self.assertGreater({n}, {m})
assertIs | self.assertIsNone(None) | self.assertIsNone({n})
assertIsInstance | self.assertIsInstance({n}, int) | self.assertIsInstance({n}, str)
Regex | self.assertRegex('{n}', '^{n}$') | self.assertRegex('{n}', '^{m}$')
CountEqual | self.assertCountEqual([{n}, 1], [1, {n}]) | self.assertCountEqual([{n}, 1], [1, {m}])
ListEqual | self.assertListEqual([{n}], [{n}]) | self.assertListEqual([{n}], [{m}])
DictEqual | self.assertDictEqual({{1: {n}}}, {{1: {n}}}) | self.assertDictEqual({{1: {n}}}, {{1: {m}}})
subTest | with self.subTest('{n}'):; self.assertEqual({n}, {n}) | with self.subTest('{n}'):; self.assertEqual({n}, {m})
assertLogs | with self.assertLogs('{n}') as found:; logging.getLogger('{n}').error('{n}')&&self.assertEqual(found.output, ['ERROR:{n}:{n}']) | with self.assertLogs('{n}') as found:; logging.getLogger('{n}').error('{n}')&&self.assertEqual(found.output, ['WARNING:calc:{m}'])
assert_called | called({n}).assert_called_with({n}) | called({n}).assert_called_with({m})
called_once | called({n}).assert_called_once_with({n}) | called({n}).assert_called_once_with({m})
mock | self.assertEqual(called({n}).mock_calls, [mock.call({n})]) | self.assertEqual(called({n}).mock_calls, [mock.call({m})])
patch | with mock.patch('os.getlogin', return_value={n}):; self.assertEqual(os.getlogin(), {n}) | with mock.patch('os.getlogin', return_value={n}):; self.assertEqual({n}, {m})
assertEquals | self.assertEquals({n}, {n}) | self.assertEquals({n}, {m})
Subset | self.assertDictContainsSubset({{1: {n}}}, {{1: {n}}}) | self.assertDictContainsSubset({{1: {m}}}, {{1: {n}}})
await | self.assertEqual(await later({n}), {n}) | self.assertEqual(await later({n}), {m})
helper | helper({n}, {n}) | helper({n}, {m})
 < | self.assertTrue(0 < {n} < {m}) | self.assertTrue(0 < {m} < {n})
"""
PYTEST = """
 | assert total({n}, 1) == {n} + 1 | assert total({n}, 1) == {m} + 1
 | assert [total({n}, 1)] == [{n} + 1] | assert [total({n}, 1)] == [{m} + 1]
approx | assert {n}.5 == pytest.approx({n}.5) | assert {n}.5 == pytest.approx({m}.25)
raises | with pytest.raises(ValueError):; reject({n}) | with pytest.raises(ValueError):; keep({n})
match= | with pytest.raises(ValueError, match='{n}'):; reject({n}) | with pytest.raises(ValueError, match='{m}'):; keep({n})
pytest.fail | keep({n}) | pytest.fail('no {n}')
 in | assert {n} in [{n}, 1] | assert {m} in [{n}, 1]
not | assert not {n} == {m} | assert not {n} == total({n}, 0)
 < | assert 0 < {n} < {m} | assert 0 < {m} < {n}
assert_called | called({n}).assert_called_with({n}) | called({n}).assert_called_with({m})
mock | assert called({n}).mock_calls == [mock.call({n})] | assert called({n}).mock_calls == [mock.call({m})]
capsys | print({n})&&assert capsys.readouterr().out == '{n}\\n' | print({n})&&assert capsys.readouterr().out == '{m}\\n'
caplog | logging.getLogger('{n}').error('{n}')&&assert '{n}' in caplog.text | logging.getLogger('{n}').error('{n}')&&assert '{m} sum 9' in caplog.text
monkeypatch | monkeypatch.setattr(os, 'getlogin', lambda: {n})&&assert os.getlogin() == {n} | monkeypatch.setattr(os, 'getlogin', lambda: {n})&&assert os.getlogin() == {m}
fixture | assert given == {n} | assert given == {m}
parametrize | assert left == {n} | assert left == {m}
helper | helper({n}, {n}) | helper({n}, {m})
"""

PARTS = """
def total(a, b):
    return a + b
def keep(value):
    return value
def reject(value):
    raise ValueError(str(value))
def helper(first, second):
    assert first == second
def called(value):
    found = mock.Mock()
    found(value)
    return found
def printed(value):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print(value, end='')
    return out.getvalue()
async def later(value):
    return value
"""


MODULES = (
    *("base64", "collections", "contextlib", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "io"),
    *("ipaddress", "json", "logging", "math", "operator", "os", "pathlib", "re", "subprocess", "uuid"),
)
MAX_CANARIES = 40


class Canaries:
    """``source`` is a module; ``ends`` says of each of its tests, by name, whether it must pass."""

    def __init__(self, words: str, framework: str) -> None:
        self.ends: dict[str, bool] = {}
        bodies = [*_rows(UNITTEST if framework == "unittest" else PYTEST, words)]
        check = "self.assertEqual({}, {})" if framework == "unittest" else "assert ({}) == {}"
        for expression, right, wrong in _rows(EXPRESSIONS, words):
            bodies.append((check.format(expression, right), check.format(expression, wrong)))
        tests = [
            (text, passes) for pair in bodies[:MAX_CANARIES] for text, passes in zip(pair, (True, False), strict=True)
        ]
        tests.sort(key=lambda _: os.urandom(4))
        write = self._method if framework == "unittest" else self._function
        text = "".join(write(*test) for test in tests)
        imports = ["import unittest"] if framework == "unittest" else ["import pytest"]
        imports += [f"import {name}" for name in MODULES if f"{name}." in text + PARTS]
        imports += ["from unittest import mock"] if "mock." in text or "called(" in text else []
        self.source = "\n".join((*imports, PARTS, text))

    def _name(self, passes: bool) -> str:
        first, second, *_ = sorted(WORDS, key=lambda _: os.urandom(4))
        name = f"test_{first}_{second}_{len(self.ends)}"
        self.ends[name] = passes
        return name

    def _body(self, text: str, indent: int) -> tuple[str, int]:
        number = 3 + int.from_bytes(os.urandom(2), "big")
        text = text.replace("{n}", str(number)).replace("{m}", str(number + 1 + os.urandom(1)[0]))
        return text.replace(":; ", ":\n    ").replace("&&", "\n").replace("\n", "\n" + " " * indent), number

    def _method(self, text: str, passes: bool) -> str:
        kind, start = ("IsolatedAsyncioTestCase", "async def") if "await" in text else ("TestCase", "def")
        body, number = self._body(text, 8)
        name = self._name(passes)
        return f"class Test{number}x{len(self.ends)}(unittest.{kind}):\n    {start} {name}(self):\n        {body}\n"

    def _function(self, text: str, passes: bool) -> str:
        body, number = self._body(text, 4)
        name = self._name(passes)
        body = body.replace("given", f"given_{name}")
        given = [one for one in ("capsys", "caplog", "monkeypatch", f"given_{name}", "left") if one in body]
        before = f"@pytest.fixture\ndef given_{name}():\n    return {number}\n" if "given" in body else ""
        before += f"@pytest.mark.parametrize('left', [{number}])\n" if "left" in given else ""
        return f"{before}def {name}({', '.join(given)}):\n    {body}\n"


def _rows(table: str, words: str) -> Iterable[tuple[str, ...]]:
    for line in table.strip("\n").split("\n"):
        word, *rest = line.split(" | ")
        if word.strip() in words:
            yield tuple(part.replace("{{", "{").replace("}}", "}") for part in rest)
