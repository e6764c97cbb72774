"""Processes that live in a process namespace of their own, seen from the host.

In: a complete command line that starts bubblewrap. Out: asyncio processes whose ``kill`` ends everything started
inside, and capped output. Knows nothing of directories, mounts or user ids.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Sequence

from north_lightning.errors import SandboxError

STARTED = b"\x02"
"""First byte on stdout of every sandboxed process, written by its init once isolation and limits are in place."""

_STREAM_BYTES = 1 << 18
_MAX_ERROR_BYTES = 4000


class SandboxProcess(Process):
    """A program in its own process namespace: ``kill`` ends it with everything that it started."""

    was_killed = False  # by ``kill``: an exit code then says nothing about the program

    async def end(self) -> int:
        """Kill what still runs, let go of the pipes, and return the exit code."""
        raise NotImplementedError

    @property
    def is_finished(self) -> bool:
        """Ended, and read to the end."""
        return self.returncode is not None and self.stdout is not None and self.stdout.at_eof()

    def terminate(self) -> None:
        """Same as ``kill``: an init gets no signal it has no handler for."""
        self.kill()

    def send_signal(self, signal: int) -> None:
        raise NotImplementedError("a signal would not reach the program; only kill() works")


class NamespaceProcess(SandboxProcess):
    """``pid`` is bubblewrap's, whose only child is the namespace's init."""

    def kill(self) -> None:
        """Kill the namespace's init. The kernel then kills all the rest before ``wait`` returns: nothing survives.

        Does not go through the transport, whose ``kill`` may reap the process behind the event loop's back.
        """
        if self.returncode is None:
            self.was_killed = True
            if not _kill_only_child(self.pid):
                _kill_child(self.pid, of=os.getpid())

    async def wait(self) -> int:
        """The exit code. What a killed program wrote and nobody has read is thrown away: it would never end."""
        pipe = self._transport.get_pipe_transport(1) if self.was_killed else None  # type: ignore[attr-defined]
        if pipe is not None:
            pipe.close()
        return await super().wait()

    async def end(self) -> int:
        self.kill()
        exit_code = await self.wait()
        self._transport.close()  # type: ignore[attr-defined]
        return exit_code


def _kill_only_child(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            child = int(children.read().split()[0])
    except (OSError, IndexError, ValueError):
        return False
    return _kill_child(child, of=pid)


def _kill_child(pid: int, of: int) -> bool:
    """SIGKILL to ``pid`` if it still is a child of ``of``; a number that was given to another process is left alone."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as status:
            parent = int(status.read().rpartition(")")[2].split()[1])
        if parent == of:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        return parent == of
    except OSError:
        return False
    finally:
        os.close(handle)


def word_bytes(text: str) -> bytes:
    """What of ``text`` a program can be given: without NUL characters and unpaired surrogates."""
    text = text.replace("\0", "")
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="replace")


async def start(argv: Sequence[str | bytes], *, with_stdin: bool, pass_fds: Sequence[int] = ()) -> NamespaceProcess:
    """Start ``argv`` and return once its ``STARTED`` byte is there; ``SandboxError`` with its words otherwise."""
    loop = asyncio.get_running_loop()
    try:
        transport, protocol = await loop.subprocess_exec(
            lambda: asyncio.subprocess.SubprocessStreamProtocol(limit=_STREAM_BYTES, loop=loop),
            *argv,
            stdin=subprocess.PIPE if with_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            pass_fds=tuple(pass_fds),
        )
    except OSError as error:
        raise SandboxError(f"cannot start {argv[0]!r}: {error}") from error
    process = NamespaceProcess(transport, protocol, loop)
    assert process.stdout is not None
    try:
        words = await process.stdout.read(1)
        if words == STARTED:
            return process
        while len(words) < _MAX_ERROR_BYTES and (chunk := await process.stdout.read(_MAX_ERROR_BYTES)):
            words += chunk
    except BaseException:
        process.kill()
        raise
    await process.end()
    raise SandboxError(f"the sandbox did not start: {words.decode(errors='replace').strip() or 'no message'}")


class CappedOutput:
    """Keeps the first and the last half of at most ``max_bytes`` of a stream."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._half = max(max_bytes // 2, 1)
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0

    def add(self, chunk: bytes) -> None:
        self.num_bytes += len(chunk)
        room = self._half - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        if chunk:
            self._tail.append(chunk)
            self._tail_bytes += len(chunk)
            while self._tail_bytes - len(self._tail[0]) >= self._half:
                self._tail_bytes -= len(self._tail.popleft())

    @property
    def head(self) -> bytes:
        return bytes(self._head)

    @property
    def tail(self) -> bytes:
        return b"".join(self._tail)[-self._half :]

    @property
    def num_left_out(self) -> int:
        """Bytes between head and tail that were thrown away."""
        return self.num_bytes - len(self._head) - min(self._tail_bytes, self._half)

    def text(self) -> str:
        """Decoded, undecodable bytes replaced; a line says how many bytes were left out between head and tail."""
        if not self.num_left_out:
            return (self.head + self.tail).decode(errors="replace")
        head, tail = self.head.decode(errors="replace"), self.tail.decode(errors="replace")
        return f"{head}\n[... {self.num_left_out} bytes left out ...]\n{tail}"
