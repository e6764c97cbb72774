"""The process that judges, and the processes in which untrusted code runs. It runs *inside* a sandbox.

In: ``/logs/verifier/expected`` (ids, one a line) and ``/logs/verifier/secrets`` (a secret for each, in that order, and
a last one for the whole run). Out: ``/logs/verifier/results``: the secrets of passed tests, the last secret after an
orderly end, notes (``! id outcome text``).

``Judge`` is the parent: it forks a child for every file of tests, reads from a pipe what the child says, and never
loads a line of the task or the attempt. The secrets are read once the last child has ended, and the kernel lets no
process of the same user look into this one. A child has a token for each test, no secret; half of what it has tokens
for are canaries, which it must report as they are known to end.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping

TYPE_CHECKING = False  # typing takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

globals()["__builtins__"] = dict(vars(__import__("builtins")))  # of the functions below, whatever becomes of the module

LOGS = "/logs/verifier"
END = "-"
MAX_MESSAGE_CHARS = 400
MAX_NOTES_BYTES = 400_000
MAX_SAID_BYTES = 16_000_000
_SET_DUMPABLE = 4  # of prctl
_write = os.write


class Tampered(Exception):
    """The code under test changed the machinery that judges it."""


class Channel:
    """A child's way to its parent."""

    def __init__(self, tokens: dict[str, str], descriptor: int) -> None:
        self._tokens = tokens
        self._descriptor = descriptor

    def is_expected(self, test_id: str) -> bool:
        return test_id in self._tokens

    def passed(self, test_id: str) -> None:
        """``END`` for the whole child; a test that is not expected has no token."""
        if test_id in self._tokens:
            self._write(f"+ {self._tokens[test_id]}\n")

    def note(self, test_id: str, outcome: str, message: str) -> None:
        """``failed``, or another word; only people read the message."""
        if test_id in self._tokens and test_id != END:
            self._write(f"- {self._tokens[test_id]} {outcome}\n")
        self._write(f"! {test_id} {outcome} {str(message)[-MAX_MESSAGE_CHARS:]!a}\n")

    def _write(self, line: str) -> None:
        _write(self._descriptor, line.encode())


class Judge:
    """Reads what is expected when it is made; nothing of the code under test may be loaded by then."""

    def __init__(self) -> None:
        with open(f"{LOGS}/expected") as file:
            self.expected = file.read().splitlines()
        self._secrets = os.open(f"{LOGS}/secrets", os.O_RDONLY | os.O_NOFOLLOW)
        self._results = os.open(f"{LOGS}/results", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        for name in ("expected", "secrets", "results"):
            os.unlink(f"{LOGS}/{name}")
        self._passed: set[str] = set()
        self._notes: list[str] = []
        self._is_orderly = True
        hide(True)
        # The code under test must not find the runner by name.
        sys.modules["__main__"] = types.ModuleType("__main__")

    def run(
        self,
        tests: Iterable[str],
        canaries: Mapping[str, bool],
        work: Callable[[Channel], None],
        limit_s: float = float("inf"),
        by_exit_code: bool = False,
    ) -> None:
        """Call ``work`` in a child, which says how ``tests`` and ``canaries`` (name -> does it pass) end.

        ``by_exit_code``: the tests have passed if the child ends with exit code 0, as a script that does that work.
        """
        ids = [*tests, *canaries, END]
        tokens = {test: os.urandom(8).hex() for test in ids}
        ours, theirs = os.pipe()
        sys.stdout.flush()
        gc.freeze()  # a child need not collect what was there before
        child = os.fork()
        if child == 0:
            self._be_child(
                Channel(dict(sorted(tokens.items(), key=lambda one: one[1])), theirs), ours, work, by_exit_code
            )
        os.close(theirs)
        said, code = self._listen(ours, child, f"+ {tokens[END]}\n".encode(), limit_s)
        os.close(ours)
        if by_exit_code:
            self._passed |= set(tests) if code == 0 else set()
            self._notes += [] if code == 0 else [f"! {' '.join(tests)} failed 'exit code {code}'\n"]
            return
        heard: dict[str, list[str]] = {}
        for line in said.decode(errors="replace").splitlines():
            sign, _, rest = line.partition(" ")
            if sign == "!":
                test = rest.partition(" ")[0]
                if test not in canaries:
                    self._note(rest)
            else:
                token, _, outcome = rest.partition(" ")
                heard.setdefault(token, []).append("passed" if sign == "+" else outcome)
        passed = {test for test in ids if heard.get(tokens[test]) == ["passed"]}
        if END not in passed:
            self._is_orderly = False
            return
        for name, passes in canaries.items():
            told = heard.get(tokens[name], ["missing"])
            if (name in passed) != passes or (not passes and told not in (["failed"], ["error"])):
                must = f"a canary that must {'pass' if passes else 'fail'}: {', '.join(told)}"
                self._note(f"{END} tampered {must!a}")
                return
        self._passed |= passed - {END}

    def _be_child(self, channel: Channel, ours: int, work: Callable[[Channel], None], by_exit_code: bool) -> None:
        for descriptor in (ours, self._secrets, self._results):
            os.close(descriptor)
        os.setpgid(0, 0)
        self.__dict__.clear()
        hide(False)
        if by_exit_code:
            work(channel)
            sys.exit()
        try:
            work(channel)
            channel.passed(END)
        except Tampered as error:
            channel.note(END, "tampered", str(error))
        except BaseException as error:
            channel.note(END, "ended-early", repr(error))
        finally:
            os._exit(0)  # nothing that the code under test registered may run now

    @staticmethod
    def _listen(pipe: int, child: int, end: bytes, limit_s: float) -> tuple[bytes, int]:
        """What the child says until ``end``, or until it ends, and its exit code; its group is no more then."""
        said, is_open, is_over, ends_at = b"", True, False, time.monotonic() + limit_s
        while not is_over:
            is_over = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            is_over = is_over or time.monotonic() > ends_at
            if not is_open and not is_over:
                time.sleep(0.01)
            while is_open and select.select([pipe], [], [], 0 if is_over else 0.05)[0]:
                part = os.read(pipe, 65536)
                said += part
                is_open = bool(part)
                is_over = is_over or said.endswith(end) or len(said) > MAX_SAID_BYTES
                if is_over:
                    break
        for kill in (os.killpg, os.kill):
            try:
                kill(child, signal.SIGKILL)
            except OSError:
                continue  # it had no time to lead a group, or has none left
        return said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _note(self, text: str) -> None:
        self._notes.append(f"! {text}\n")

    def end(self) -> None:
        """Hand the secrets of what passed to the verifier, and exit."""
        with open(self._secrets) as file:
            secrets = file.read().split()
        lines = [secret for secret, test in zip(secrets, self.expected, strict=False) if test in self._passed]
        lines += [secrets[-1]] if self._is_orderly else []
        notes = "".join(sorted(self._notes, key=lambda note: " tampered " not in note))[:MAX_NOTES_BYTES]
        _write(self._results, "".join(f"{line}\n" for line in lines).encode() + notes.encode(errors="replace"))
        os._exit(0 if self._is_orderly else 1)


def hide(hidden: bool) -> None:
    """Whether other processes of this user may read this one's memory and descriptors."""
    try:
        import _ctypes  # all of ctypes takes ten times as long to load
    except ImportError:
        return
    this_program: Any = None
    prctl = _ctypes.dlsym(_ctypes.dlopen(this_program, 0), "prctl")
    _ctypes.call_function(prctl, (_SET_DUMPABLE, 0 if hidden else 1, 0, 0, 0))
