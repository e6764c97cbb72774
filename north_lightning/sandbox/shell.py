"""One bash that stays: directory and variables persist from command to command. Over pipes, without a terminal.

In: command lines and file contents. Out: results. Commands read from ``/dev/null``. A command that exceeds its time, or
ends the shell, costs the variables but not the directory: the next one runs in a new shell there. Files are read and
written by a process inside the sandbox: the host never opens a path that the model controls.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from asyncio.subprocess import Process

from north_lightning.errors import SandboxError
from north_lightning.interfaces import Sandbox
from north_lightning.sandbox.processes import CappedOutput, word_bytes
from north_lightning.types import CommandResult

_CHUNK_BYTES = 1 << 18
_MAX_OUTPUT_FACTOR = 256  # a command that prints this many times its cap is killed
_FILE_TIMEOUT_S = 30.0
_MAX_PATH = 4096
_TIMED_OUT, _FLOODED = 124, 137  # exit codes, as timeout(1) and a killed shell have them

# Exit codes of the two scripts below, and what they mean to the caller.
_FILE_ERRORS: dict[int, type[OSError]] = {
    91: FileNotFoundError,
    92: IsADirectoryError,
    93: PermissionError,
    94: OSError,
}
_READ = (
    'cd -- "$2" || exit 91; [ -e "$1" ] || exit 91; [ -f "$1" ] || exit 92; [ -r "$1" ] || exit 93; exec cat -- "$1"'
)
_WRITE = (
    'cd -- "$2" || exit 91; d=$(dirname -- "$1"); [ -d "$d" ] || exit 91; [ ! -e "$1" ] || [ -f "$1" ] || exit 92;'
    ' { : >"$1"; } 2>/dev/null || exit 93; cat >"$1" || exit 94'
)


class _ShellEndedError(Exception):
    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.reason = reason


class Shell:
    """A persistent bash in ``sandbox``, started when first needed. One call at a time.

    Args:
        sandbox: where it runs.
        max_output_bytes: output of a command that is kept, half from the start and half from the end.
        max_file_bytes: longest file that ``read_file`` returns.
    """

    def __init__(self, sandbox: Sandbox, *, max_output_bytes: int = 1 << 20, max_file_bytes: int = 16 << 20) -> None:
        self.directory = "/work"  # the shell's, after the last command
        self._sandbox = sandbox
        self._max_output_bytes = max_output_bytes
        self._max_file_bytes = max_file_bytes
        self._process: Process | None = None
        self._rest = b""  # printed by background jobs after the last command ended

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        """Run ``command``; exit code 124 at the time-out. A last line in brackets says so if the shell was lost.

        Background jobs live on until the shell ends; what they print comes with a later command.
        """
        output = CappedOutput(self._max_output_bytes)
        timed_out, lost = False, ""
        try:
            async with asyncio.timeout(timeout_s):
                exit_code = await self._evaluate(command, output)
        except TimeoutError:
            exit_code, timed_out, lost = _TIMED_OUT, True, f"the command was killed after {timeout_s:g} s"
        except _ShellEndedError as ended:
            exit_code, lost = ended.exit_code, ended.reason
        text = output.text()
        if lost:
            text += "\n" * (text != "" and not text.endswith("\n"))
            text += f"[{lost}; the next command runs in a new shell in {self.directory}, variables are lost]\n"
        return CommandResult(text, exit_code, timed_out)

    async def read_file(self, path: str) -> bytes:
        """The content of a regular file; a relative path starts at ``directory``.

        ``FileNotFoundError``, ``IsADirectoryError`` (special files too), ``PermissionError``, or ``OSError`` if it is
        longer than ``max_file_bytes``.
        """
        process = await self._file_process("read", _READ, path)
        assert process.stdout is not None
        content = bytearray()
        try:
            async with asyncio.timeout(_FILE_TIMEOUT_S):
                while chunk := await process.stdout.read(_CHUNK_BYTES):
                    content += chunk
                    if len(content) > self._max_file_bytes:
                        raise OSError(f"{path}: longer than {self._max_file_bytes} bytes")
                exit_code = await process.wait()
        except TimeoutError:
            raise OSError(f"{path}: reading took more than {_FILE_TIMEOUT_S:g} s") from None
        finally:
            await _end(process)
        _raise_file_error(path, exit_code, "")
        return bytes(content)

    async def write_file(self, path: str, content: bytes) -> None:
        """Make or replace a regular file in an existing directory; the ``OSError`` that fits if it cannot be."""
        process = await self._file_process("write", _WRITE, path)
        assert process.stdin is not None
        try:
            async with asyncio.timeout(_FILE_TIMEOUT_S):
                words, _ = await process.communicate(content)
                exit_code = await process.wait()
        except TimeoutError:
            raise OSError(f"{path}: writing took more than {_FILE_TIMEOUT_S:g} s") from None
        finally:
            await _end(process)
        _raise_file_error(path, exit_code, words.decode(errors="replace").strip())

    async def close(self) -> None:
        """End the shell and its background jobs. The next ``run`` starts a new one."""
        process, self._process, self._rest = self._process, None, b""
        if process is not None:
            await _end(process)

    async def _file_process(self, name: str, script: str, path: str) -> Process:
        if len(path) > _MAX_PATH:
            raise OSError(f"{path[:100]}...: longer than {_MAX_PATH} characters")
        return await self._sandbox.spawn(["bash", "-c", script, name, path, self.directory])

    # ---- one exchange with bash

    async def _evaluate(self, command: str, output: CappedOutput) -> int:
        """Exit code of ``command``, its output added to ``output``. If it does not come to that, the shell is ended."""
        is_done = False
        try:
            process = await self._started()
            assert process.stdin is not None
            mark = secrets.token_hex(8)
            # Traces (set -x) show the octal number, not the byte; fd 9 is the pipe even after "exec >file".
            report = f"{{ builtin printf '\\036{mark}:%d:%s\\036' $? \"$PWD\" >&9; }} 2>/dev/null\n"
            process.stdin.write(word_bytes(f"eval {_quoted(command)} </dev/null 2>&1; {report}"))
            exit_code, self.directory = await self._report(process, mark.encode(), output)
            is_done = True
            return exit_code
        finally:
            if not is_done:
                await self.close()

    async def _started(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await self._sandbox.spawn(["bash", "--noprofile", "--norc"])
            assert self._process.stdin is not None
            start = (
                f"exec 9>&1; export PAGER=cat GIT_PAGER=cat; cd -- {_quoted(self.directory)} 2>/dev/null || cd /work\n"
            )
            self._process.stdin.write(word_bytes(start))
        return self._process

    async def _report(self, process: Process, mark: bytes, output: CappedOutput) -> tuple[int, str]:
        """Collect output up to the line that tells exit code and directory."""
        start = b"\x1e" + mark + b":"
        held, self._rest = self._rest, b""
        try:
            while True:
                found = held.find(start)
                if found >= 0:
                    output.add(held[:found])
                    held = held[found:]
                    words, end, rest = held[1:].partition(b"\x1e")
                    if end:
                        held, self._rest = b"", rest
                        said = re.fullmatch(rb"[^:]*:([0-9]{1,3}):(.*)", words, re.DOTALL)
                        if said is None:  # the command gave the shell another printf, or another builtin
                            raise _ShellEndedError(_FLOODED, "the shell no longer says how commands end")
                        return int(said[1]), said[2].decode(errors="surrogateescape")
                else:
                    cut = max(len(held) - len(start) + 1, 0)
                    output.add(held[:cut])
                    held = held[cut:]
                if output.num_bytes > _MAX_OUTPUT_FACTOR * self._max_output_bytes:
                    raise _ShellEndedError(_FLOODED, f"the command was killed after {output.num_bytes} bytes of output")
                held += await self._chunk(process)
        finally:
            output.add(held)

    async def _chunk(self, process: Process) -> bytes:
        assert process.stdout is not None
        chunk = await process.stdout.read(_CHUNK_BYTES)
        if chunk:
            return chunk
        exit_code = await process.wait()
        if exit_code < 0:
            raise SandboxError(f"the shell's sandbox died (signal {-exit_code})")
        raise _ShellEndedError(exit_code, f"the shell ended with exit code {exit_code}")


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def _quoted(text: str) -> str:
    return "'" + text.replace("\0", "").replace("'", "'\\''") + "'"


def _raise_file_error(path: str, exit_code: int, words: str) -> None:
    if exit_code == 0:
        return
    error = _FILE_ERRORS.get(exit_code, OSError)
    meaning = {91: "no such file or directory", 92: "not a regular file", 93: "permission denied"}
    raise error(f"{path}: {meaning.get(exit_code) or words or f'exit code {exit_code}'}")
