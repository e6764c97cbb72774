"""Programs in an environment that can do no more than execute a command and say what it printed.

In: ``execute(script)``, one round trip each. Out: asyncio processes with pipes on stdin and stdout, a ``kill`` that
works inside, and exit codes. Inside, a program is a directory: a FIFO for what it reads, a file for what it prints, its
exit code. The environment needs ``sh``, coreutils and ``setsid``.

A program's descendants are told by a variable in their environment and killed with it; one that empties its
environment lives until the environment itself is stopped.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
import shlex
import signal
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Awaitable, Callable, Sequence

from north_lightning.errors import SandboxError
from north_lightning.sandbox.processes import SandboxProcess, word_bytes

Execute = Callable[[str], Awaitable[str]]
"""Runs a script by ``sh`` inside and returns its stdout; ``SandboxError`` if it cannot or the script fails."""

FOLDER = "/tmp/.north_lightning"
KILLED = 128 + signal.SIGKILL
_READ_BYTES = 1 << 18
_WRITE_BYTES = 48 << 10  # as a word of a command line, and below a FIFO's 64 KiB
_POLL_S = 10  # a round trip waits so long for something to happen

_KILL = """
while :; do found=; for p in /proc/[0-9]*; do
  if tr '\\0' '\\n' 2>/dev/null <$p/environ | grep -qx {tag}; then kill -KILL ${{p#/proc/}} 2>/dev/null && found=1; fi
done; [ -n "$found" ] || break; done
"""

_START = """set -e
umask 077; mkdir -p {folder}; cd {folder}; mkfifo in; : >out
setsid sleep 2147483647 3<>in </dev/null >/dev/null 2>&1 & echo $! >holder
{tag} setsid sh -c 'echo $$ >{folder}/pid; ulimit -f {blocks}; umask 022; cd {directory}
  "$@" <{folder}/in >>{folder}/out 2>&1; echo $? >{folder}/code.new; mv {folder}/code.new {folder}/code' sh {words} \\
  </dev/null >/dev/null 2>&1 &
while [ ! -s pid ]; do sleep 0.01; done
"""

# The code is read before the output, and after everything has ended: then the output is complete.
_POLL = """cd {folder} 2>/dev/null || {{ echo gone; exit 0; }}
i=0; while [ $i -lt {times} ]; do
  [ $(wc -c <out) -gt {start} ] && break; [ -e code ] && break; kill -0 $(cat pid) 2>/dev/null || break
  i=$((i+1)); sleep 0.05
done
if [ -e code ]; then cat code; {kill}
elif kill -0 $(cat pid) 2>/dev/null; then echo running
else sleep 0.1; cat code 2>/dev/null || echo killed; {kill}
fi
tail -c +{next} out | head -c {size} | base64
"""


class ExecutedProcess(SandboxProcess):
    """Made by ``start_executed``; ``pid`` is the environment's business."""

    stdin: StreamWriter
    stdout: StreamReader
    stderr: None

    def __init__(self, execute: Execute, folder: str, tag: str) -> None:
        loop = asyncio.get_running_loop()
        self.pid = 0
        self.stdout = StreamReader(limit=_READ_BYTES, loop=loop)
        self.stderr = None
        self._execute = execute
        self._folder = folder
        self._kill_script = _KILL.format(tag=tag)
        self._exit_code: int | None = None
        self._error: SandboxError | None = None
        self._killing = asyncio.Event()
        self._pipe = _Pipe(execute, folder)
        protocol = StreamReaderProtocol(StreamReader(loop=loop), loop=loop)
        self.stdin = StreamWriter(self._pipe, protocol, None, loop)
        self.stdout.set_transport(self._pipe)
        self._watch = asyncio.ensure_future(self._until_ended())

    @property
    def returncode(self) -> int | None:
        return self._exit_code

    def kill(self) -> None:
        if self._exit_code is None:
            self.was_killed = True
            self._killing.set()

    async def wait(self) -> int:
        """The exit code; ``SandboxError`` if the environment did not do as it was told."""
        await asyncio.shield(self._watch)
        if self._error is not None:
            raise self._error
        assert self._exit_code is not None
        return self._exit_code

    async def end(self) -> int:
        self.kill()
        return await self.wait()

    async def communicate(self, input: bytes | bytearray | memoryview | None = None) -> tuple[bytes, bytes]:
        """Feed ``input``, read to the end; the second value is always empty, as stderr joins stdout."""
        if input is not None:
            self.stdin.write(input)
        self.stdin.close()
        output = await self.stdout.read()
        await self.wait()
        return output, b""

    async def _until_ended(self) -> None:
        """Read to the end, or kill; then nothing is left inside."""
        reading = asyncio.ensure_future(self._read())
        killing = asyncio.ensure_future(self._killing.wait())
        code = -signal.SIGKILL
        try:
            await asyncio.wait((reading, killing), return_when=asyncio.FIRST_COMPLETED)
            if self._killing.is_set():
                reading.cancel()
                await self._execute(self._kill_script)
                code = KILLED
            else:
                code = reading.result()
            await self._execute(f"kill -KILL $(cat {self._folder}/holder) 2>/dev/null; rm -rf {self._folder}")
        except SandboxError as error:
            self._error = error
        finally:
            for task in (reading, killing):
                task.cancel()
            self._pipe.abort()
            self._exit_code = code
            self.stdout.feed_eof()

    async def _read(self) -> int:
        """The exit code, once everything has been read."""
        start = 0
        while True:
            await self._pipe.may_read.wait()
            script = _POLL.format(
                folder=self._folder, start=start, next=start + 1, size=_READ_BYTES, times=20 * _POLL_S,
                kill=self._kill_script,
            )  # fmt: skip
            state, _, encoded = (await self._execute(script)).partition("\n")
            try:
                chunk = base64.b64decode("".join(encoded.split()))
                code = {"running": None, "killed": KILLED, "gone": -signal.SIGKILL}.get(state.strip(), -1)
                code = int(state) & 255 if code == -1 else code
            except (ValueError, binascii.Error):
                raise SandboxError(f"the environment's answer makes no sense: {state[:100]!r}") from None
            start += len(chunk)
            if chunk:
                self.stdout.feed_data(chunk)
            if code is not None and len(chunk) < _READ_BYTES:
                return code


class _Pipe(asyncio.Transport):
    """The stdin of a program, and the brake on its stdout."""

    def __init__(self, execute: Execute, folder: str) -> None:
        super().__init__()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._execute = execute
        self._folder = folder
        self._waiting = bytearray()
        self._is_closing = False
        self._changed = asyncio.Event()
        self._writing = asyncio.ensure_future(self._write_all())

    def pause_reading(self) -> None:
        self.may_read.clear()

    def resume_reading(self) -> None:
        self.may_read.set()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._waiting += data
        self._changed.set()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.close()

    def close(self) -> None:
        self._is_closing = True
        self._changed.set()

    def is_closing(self) -> bool:
        return self._is_closing

    def abort(self) -> None:
        self._is_closing = True
        self._writing.cancel()

    async def _write_all(self) -> None:
        """Every piece once the one before is in the FIFO; then the end of the input. A program that is gone reads
        nothing: what it was sent is lost, as with a pipe."""
        try:
            while not (self._is_closing and not self._waiting):
                if not self._waiting:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                piece = base64.b64encode(self._waiting[:_WRITE_BYTES]).decode()
                del self._waiting[:_WRITE_BYTES]
                await self._execute(f"cd {self._folder} && echo {piece} | base64 -d >in")
            await self._execute(f"kill -KILL $(cat {self._folder}/holder)")
        except SandboxError:
            self._is_closing = True


async def start_executed(
    execute: Execute, argv: Sequence[str], variables: dict[str, str], max_file_bytes: int, *, with_stdin: bool
) -> ExecutedProcess:
    """Start ``argv`` in ``/work``; ``SandboxError`` if the environment cannot."""
    number = secrets.token_hex(8)
    folder, tag = f"{FOLDER}/{number}", f"NORTH_PROCESS={number}"
    words = [f"{name}={value}" for name, value in variables.items()]
    words += [word_bytes(word).decode(errors="surrogateescape") for word in argv]
    script = _START.format(
        folder=folder, tag=tag, directory="/work", blocks=max(max_file_bytes // 512, 1),
        words=shlex.join(["env", *words]),
    )  # fmt: skip
    await execute(script)
    process = ExecutedProcess(execute, folder, tag)
    if not with_stdin:
        process.stdin.close()
    return process
