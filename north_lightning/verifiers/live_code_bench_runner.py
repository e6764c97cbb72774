"""Runs one LiveCodeBench answer on inputs that arrive one at a time. It runs *inside* a sandbox.

In, on stdin: frames, a decimal length and a newline before each: first ``{"code", "fn_name", "stdin_buffer"}``, then
``{"input"}`` of each test. Out, on stdout: a frame for each: ``{}`` before the code is loaded, then ``{"output"}`` or
``{"error"}``. What is expected never comes here: the verifier outside compares (``live_code_bench``), so that nothing
the code does or reads can make a wrong output right.

All tests run in one process, as in the official runner: what a solution keeps in its modules lives from test to test.
So do names that are always there (``PREAMBLE``), what ``open`` and ``sys.stdin`` are for code that reads stdin, the
functions that are taken away (``guard``), and the alarm of ``TIMEOUT_S`` for loading and for each test.

Only the standard library is imported here, and numpy if the code does.
"""

import ast
import builtins
import contextlib
import decimal
import fractions
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


def run_test(function: Any, text: str, is_call: bool, has_buffer: bool) -> dict[str, Any]:
    """The answer to one input; an ``error`` where there is none."""
    try:
        arguments = [json.loads(line) for line in text.split("\n")] if is_call else []
        signal.alarm(TIMEOUT_S)
        if not is_call:
            return {"output": run_with_stdin(function, text, has_buffer)}
        value = function(*arguments)
        signal.alarm(0)
        return {"output": encode(value)}
    except Exception as error:
        signal.alarm(0)
        return failure(error)


def failure(error: Exception) -> dict[str, Any]:
    is_late = "timeoutexception" in repr(error).lower()
    return {"error": "timeout" if is_late else "exception", "what": repr(error)[:300]}


# ---- values --------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A value as JSON, its type beside what JSON cannot say; ``["other"]`` for what equals no expected value."""
    if type(value).__module__ == "numpy":
        is_array = type(value).__name__ == "ndarray"
        if is_array and value.size != 1:
            return ["other"]
        one = value.item()
        if value.dtype.kind in "biufc" and type(one).__module__ != "numpy":
            return ["array" if is_array else "numpy", value.dtype.name, encode(one)]
        return encode(one) if isinstance(one, str) and not is_array else ["other"]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, decimal.Decimal):
        return ["Decimal", str(value)]
    if isinstance(value, fractions.Fraction):
        return ["Fraction", hex(value.numerator), hex(value.denominator)]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", *map(encode, value)]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(below)] for key, below in value.items())]
    return ["other"]


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
        send(run_test(function, receive()["input"], name is not None, task["stdin_buffer"]))


if __name__ == "__main__":
    main()
