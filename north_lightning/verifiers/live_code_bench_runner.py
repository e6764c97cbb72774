"""Runs one LiveCodeBench answer on inputs that arrive one at a time. It runs *inside* a sandbox.

In, on stdin: frames, a decimal length and a newline before each: first ``{"code", "fn_name", "stdin_buffer"}``, then
``{"input"}`` of each test. Out, on stdout: a frame for each: ``{}`` before the code is loaded, then ``{"output"}`` or
``{"error"}``. As in the official runner, a test with its ``"expected"`` is compared here, in the process of the code:
the answer is ``{"passed"}``. Strict grading sends no ``"expected"`` and compares outside (``live_code_bench``), so that
nothing the code does or reads can make a wrong output right.

All tests run in one process, as in the official runner: what a solution keeps in its modules lives from test to test.
So do names that are always there (``PREAMBLE``), what ``open`` and ``sys.stdin`` are for code that reads stdin, the
functions that are taken away (``guard``), and the alarm of ``TIMEOUT_S`` for loading and for each test.

Only the standard library is imported here, and numpy if the code does.
"""

import ast
import builtins
import contextlib
import decimal
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from typing import Any
from unittest import mock

TIMEOUT_S = 6
PACKAGES = "/grader/packages"

MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
PREAMBLE = "".join(
    (
        *(f"from {name} import *\n" for name in (*MODULES, "builtins", "typing")),
        *(f"import {name}\n" for name in MODULES),
        "sys.setrecursionlimit(50000)\n",
    )
)
TAKEN = {
    os: (
        *("kill", "system", "putenv", "remove", "removedirs", "rmdir", "fchdir", "setuid", "fork", "forkpty"),
        *("killpg", "rename", "renames", "truncate", "replace", "unlink", "fchmod", "fchown", "chmod", "chown"),
        *("chroot", "lchflags", "lchmod", "lchown", "getcwd", "chdir"),
    ),
    shutil: ("rmtree", "move", "chown"),
    subprocess: ("Popen",),
    builtins: ("quit", "help"),
}


class TimeoutException(Exception):  # its name is in what the official runner reports
    """The alarm went off."""


def on_alarm(number: int, frame: object) -> None:
    raise TimeoutException


def guard() -> None:
    """Take away what the official runner takes away: code that calls it fails."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for module, names in TAKEN.items():
        for name in names:
            setattr(module, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]


# ---- the code ------------------------------------------------------------------------------------------------------


def without_guard(code: str) -> str:
    """``code`` with the body of a last ``if __name__ == '__main__'`` in its place."""
    try:
        body = ast.parse(code).body
        if isinstance(body[-1], ast.If) and ast.unparse(body[-1].test).strip() == "__name__ == '__main__'":
            return "\n".join(map(ast.unparse, ([*body[:-1]], [*body[-1].body])))  # type: ignore[arg-type]
    except Exception:  # code that cannot be read fails when it is run
        pass
    return code


def as_function(code: str) -> str:
    """``code`` as the body of a function ``wrapped_function``, its imports before it."""
    try:
        body = ast.parse(code).body
        imports = [one for one in body if isinstance(one, ast.Import | ast.ImportFrom)]
        others = [one for one in body if not isinstance(one, ast.Import | ast.ImportFrom)]
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        function = ast.FunctionDef("wrapped_function", nothing, others, [], lineno=-1)
        return f"{PREAMBLE}\n{ast.unparse(imports)}\n{ast.unparse(function)}"  # type: ignore[arg-type]
    except Exception:
        return code


def load(code: str, name: str) -> Any:
    """The function ``name`` of ``code``, or of the class ``Solution`` in it."""
    module = types.ModuleType("tmp_sol", "")
    signal.alarm(TIMEOUT_S)
    try:
        exec(code, module.__dict__)
        holder = module.Solution() if "class Solution" in code else module
    finally:
        signal.alarm(0)
    return getattr(holder, name)


def stdin_of(text: str, has_buffer: bool) -> io.StringIO:
    """What code reads. ``buffer`` is as in newer official runners: every ``readline`` gives the first line."""
    stdin: Any = type("Stdin", (io.StringIO,), {})(text)
    if has_buffer:
        data = text.encode()
        first = data.split(b"\n")[0] + b"\n"
        stdin.buffer = types.SimpleNamespace(read=lambda *_: data, readline=lambda *_: first)
    return stdin


def run_with_stdin(function: Any, text: str, has_buffer: bool) -> str:
    """What ``function`` prints when ``text`` is its input."""
    lines = iter(text.split("\n"))
    printed, shown = io.StringIO(), sys.stdout
    printed.close = lambda _: None  # type: ignore  # close() fails, as there
    sys.stdout = printed
    try:
        # In this order: code that holds the true sys.stdin from its import is served too.
        with (
            mock.patch("sys.stdin.read", lambda *_: text),  # noqa: PT008
            mock.patch("sys.stdin.readlines", lambda *_: text.split("\n")),  # noqa: PT008
            mock.patch("sys.stdin.readline", lambda *_: next(lines)),  # noqa: PT008
            mock.patch("sys.stdin", stdin_of(text, has_buffer)),
            mock.patch("builtins.open", mock.mock_open(read_data=text)),
            contextlib.suppress(SystemExit),
        ):
            function()
        signal.alarm(0)
        return printed.getvalue()
    finally:
        sys.stdout = shown


def run_test(function: Any, question: dict[str, Any], is_call: bool, has_buffer: bool) -> dict[str, Any]:
    """What one input gives, or whether that is ``expected``; an ``error`` where there is none."""
    try:
        text = question["input"]
        arguments = [json.loads(line) for line in text.split("\n")] if is_call else []
        signal.alarm(TIMEOUT_S)
        value = function(*arguments) if is_call else run_with_stdin(function, text, has_buffer)
        signal.alarm(0)
        if "expected" in question:
            return {"passed": (same_value if is_call else same_lines)(value, question["expected"])}
        return {"output": json.loads(json.dumps(value, default=number_of))}
    except Exception as error:
        signal.alarm(0)
        return failure(error)


def failure(error: Exception) -> dict[str, Any]:
    is_late = "timeoutexception" in repr(error).lower()
    return {"error": "timeout" if is_late else "exception", "what": repr(error)[:300]}


# ---- comparison ----------------------------------------------------------------------------------------------------


def same_lines(printed: Any, expected: str) -> bool:
    """Line by line, blanks around each apart: the same text, or the same decimals."""
    lines, wanted = ([line.strip() for line in str(text).strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    try:
        return line == wanted or [*map(decimal.Decimal, line.split())] == [*map(decimal.Decimal, wanted.split())]
    except ArithmeticError:
        return False


def same_value(value: Any, expected: str) -> bool:
    """``==`` with the JSON value ``expected``; a tuple is a list, and an array of one element is that element."""
    return bool((list(value) if isinstance(value, tuple) else value) == json.loads(expected))


def number_of(value: Any) -> Any:
    """What a value of numpy with one element is as JSON; an exception for any other that JSON has no word for."""
    if type(value).__module__ != "numpy":
        raise TypeError(f"a value of {type(value)}")
    return value.item()


# ---- frames --------------------------------------------------------------------------------------------------------


def main() -> None:
    incoming, outgoing = (os.fdopen(os.dup(number), mode) for number, mode in ((0, "rb"), (1, "wb")))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)

    def receive() -> Any:
        return json.loads(incoming.read(int(incoming.readline())))

    def send(answer: dict[str, Any]) -> None:
        frame = json.dumps(answer).encode()
        outgoing.write(b"%d\n%s" % (len(frame), frame))
        outgoing.flush()

    task = receive()
    code, name = task["code"], task["fn_name"]
    sys.set_int_max_str_digits(50_000)
    sys.path.append(PACKAGES)
    if "numpy" in code:
        try:
            import numpy  # noqa: F401
        except Exception as error:
            send({"unusable": f"numpy: {error!r}"[:300]})
    signal.signal(signal.SIGALRM, on_alarm)
    guard()
    sys.modules["__main__"] = types.ModuleType("__main__")
    send({})
    function = None
    try:
        if name is None:
            function = load(as_function(without_guard(code)), "wrapped_function")
        else:
            function = load(f"{PREAMBLE}\n\n{code}", name)
    except Exception as error:
        receive()
        send(failure(error))
    while True:
        send(run_test(function, receive(), name is not None, task["stdin_buffer"]))


if __name__ == "__main__":
    main()
