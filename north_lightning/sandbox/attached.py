"""A program in a container of its own, as an asyncio process.

In: the socket that a Docker API attached to a container. Out: pipes, exit code and ``kill``. The container's init (see
``INIT``) keeps stderr for itself: what comes there says that isolation is in place, and with which code the program
ended. A container that ends without that last word was ended from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import struct
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Callable

from north_lightning.errors import SandboxError
from north_lightning.sandbox.processes import SandboxProcess

INIT = (
    "exec 3>&2 2>&1; { echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; echo started >&3;"
    ' "$@" 3>&-; code=$?; echo "ended $code" >&3; exit $code'
)
"""The container's first process. It reaps orphans; when it ends, the kernel ends the rest of its process namespace."""

_STREAM_BYTES = 1 << 18
_MAX_ERROR_BYTES = 4000
_START_TIMEOUT_S = 60.0
_HEADER = struct.Struct(">BxxxL")  # stream number, length
_STDERR = 2
KILLED = 128 + signal.SIGKILL


class _Attached(StreamReaderProtocol):
    """Takes the frames apart: stdout goes to the reader (which can hold the sender up), the init's words are kept."""

    def __init__(self, reader: StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self.words = bytearray()
        self.said = asyncio.Event()  # the init said something, or the connection ended
        self.ended = asyncio.Event()
        self._rest = bytearray()
        self._left = 0
        self._stream = 0

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while self._rest:
            if not self._left:
                if len(self._rest) < _HEADER.size:
                    return
                self._stream, self._left = _HEADER.unpack_from(self._rest)
                del self._rest[: _HEADER.size]
            part = bytes(self._rest[: self._left])
            del self._rest[: len(part)]
            self._left -= len(part)
            if self._stream == _STDERR:
                self.words += part[: _MAX_ERROR_BYTES - len(self.words)]
                self.said.set()
            elif part:
                super().data_received(part)

    def eof_received(self) -> bool:
        super().eof_received()
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def _end(self) -> None:
        self.ended.set()
        self.said.set()


class _Stdin(StreamWriter):
    """One direction of the connection: closing it leaves the other one open."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.transport.can_write_eof() and not self.transport.is_closing():
                self.transport.write_eof()

    async def wait_closed(self) -> None:
        return None


class ContainerProcess(SandboxProcess):
    """Made by ``attach``. ``remove`` kills the container and deletes it; it may be called twice, and blocks."""

    stdin: StreamWriter
    stdout: StreamReader
    stderr: None

    def __init__(self, protocol: _Attached, stdin: _Stdin, stdout: StreamReader, remove: Callable[[], None]) -> None:
        self.pid = 0  # the engine's business
        self.stdin, self.stdout, self.stderr = stdin, stdout, None
        self._protocol = protocol
        self._exit_code: int | None = None
        self._killing = asyncio.Event()
        self._remove = remove
        self._watch = asyncio.ensure_future(self._until_removed())

    @property
    def returncode(self) -> int | None:
        return self._exit_code

    def kill(self) -> None:
        """Kill the container; ``wait`` returns once it is gone."""
        if self._exit_code is None:
            self.was_killed = self.was_killed or not self._protocol.ended.is_set()
            self._killing.set()

    async def wait(self) -> int:
        await asyncio.shield(self._watch)
        assert self._exit_code is not None
        return self._exit_code

    async def end(self) -> int:
        self.kill()
        exit_code = await self.wait()
        self.stdin.transport.close()
        return exit_code

    async def communicate(self, input: bytes | bytearray | memoryview | None = None) -> tuple[bytes, bytes]:
        """Feed ``input``, read to the end; the second value is always empty, as stderr joins stdout."""
        with contextlib.suppress(ConnectionError):
            if input is not None:
                self.stdin.write(input)
                await self.stdin.drain()
        self.stdin.close()
        output = await self.stdout.read()
        await self.wait()
        return output, b""

    async def _until_removed(self) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self._protocol.ended, self._killing)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        await asyncio.to_thread(self._remove)
        self._exit_code = KILLED if self.was_killed else self._last_word()

    def _last_word(self) -> int:
        """The program's exit code as the init told it; negative if the init could not."""
        words = re.findall(rb"^ended (\d{1,3})$", self._protocol.words, re.MULTILINE)
        return int(words[-1]) if words else -signal.SIGKILL


async def attach(connection: socket.socket, start: Callable[[], None], remove: Callable[[], None]) -> ContainerProcess:
    """The process in a created container, ``start``\\ ed once its output has somewhere to go.

    Raises:
        SandboxError: the container did not come to run its program; nothing of it is left then.
    """
    loop = asyncio.get_running_loop()
    stdout = StreamReader(limit=_STREAM_BYTES, loop=loop)
    transport, protocol = await loop.create_unix_connection(lambda: _Attached(stdout, loop), sock=connection)
    process = ContainerProcess(protocol, _Stdin(transport, protocol, None, loop), stdout, remove)
    try:
        await asyncio.to_thread(start)
        async with asyncio.timeout(_START_TIMEOUT_S):
            await protocol.said.wait()
        if not protocol.words.startswith(b"started"):
            words = protocol.words.decode(errors="replace") or (await stdout.read(_MAX_ERROR_BYTES)).decode(
                errors="replace"
            )
            raise SandboxError(f"the sandbox did not start: {words.strip() or 'no message'}")
    except TimeoutError:
        await process.end()
        raise SandboxError(f"the container did not start within {_START_TIMEOUT_S:g} s") from None
    except BaseException:
        await process.end()
        raise
    return process
