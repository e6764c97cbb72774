"""What a sandbox does with programs, however they are started inside.

In: ``_launch`` of a subclass. Out: ``spawn``, ``run`` with its time-out and its cap on output, and the end of all that
still runs. Knows nothing of files.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence

from north_lightning.errors import SandboxError
from north_lightning.interfaces import Sandbox
from north_lightning.sandbox.processes import CappedOutput, SandboxProcess, word_bytes
from north_lightning.types import CommandResult

_CHUNK_BYTES = 1 << 18
_MAX_WORD_BYTES = 100_000  # the kernel takes 128 KiB as one word of a command line
_KILL_TIMEOUT_S = 20.0  # less than what closing a sandbox may take
_MAX_OUTPUT_FACTOR = 256  # a run that prints this many times its cap is killed


class ProgramSandbox(Sandbox):
    """A sandbox whose programs are ``SandboxProcess``es: each ends with all that it started.

    Args:
        max_output_bytes: output of ``run`` that is kept, half from the start and half from the end.
    """

    def __init__(self, max_output_bytes: int) -> None:
        self._max_output_bytes = max_output_bytes
        self._processes: set[SandboxProcess] = set()
        self._closing: asyncio.Task[None] | None = None

    @abstractmethod
    async def _launch(self, argv: Sequence[str], *, with_stdin: bool) -> SandboxProcess:
        """Start ``argv``, isolated; ``SandboxError`` if it cannot be."""

    @abstractmethod
    async def _delete(self) -> None:
        """Delete everything; nothing runs any longer."""

    async def spawn(self, argv: Sequence[str]) -> SandboxProcess:
        """Start ``argv`` in a process namespace of its own; the result's ``kill`` ends all that it started."""
        return await self._start(argv, with_stdin=True)

    async def _start(self, argv: Sequence[str], *, with_stdin: bool) -> SandboxProcess:
        self._check_open()
        process = await self._launch(argv, with_stdin=with_stdin)
        self._processes = {other for other in self._processes if not other.is_finished} | {process}
        if self._closing is not None:
            await self._end_processes()
            raise SandboxError("the sandbox was closed while a program started")
        return process

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        """``bash -c command`` without input, in ``/work``; the exit code is 124 at the time-out, 137 if killed.

        Background processes end with the command. Output beyond the cap is left out of the middle, and a line says so.
        """
        script = word_bytes(command)
        if len(script) <= _MAX_WORD_BYTES:
            process = await self._start(["bash", "-c", command], with_stdin=False)
        else:
            process = await self._start(["bash", "-c", 'eval "$(cat)" </dev/null'], with_stdin=True)
            assert process.stdin is not None
            process.stdin.write(script)
            process.stdin.close()
        assert process.stdout is not None
        output = CappedOutput(self._max_output_bytes)
        timed_out = flooded = False
        try:
            async with asyncio.timeout(timeout_s):
                while chunk := await process.stdout.read(_CHUNK_BYTES):
                    output.add(chunk)
                    if output.num_bytes > _MAX_OUTPUT_FACTOR * self._max_output_bytes:
                        flooded = True
                        break
                else:
                    await process.wait()
        except TimeoutError:
            timed_out = True
        finally:
            process.kill()
        while chunk := await process.stdout.read(_CHUNK_BYTES):
            output.add(chunk)
        exit_code = await _end(process)
        self._processes.discard(process)
        if exit_code < 0:
            raise SandboxError(f"the sandboxed process was ended from outside (signal {-exit_code})")
        self.check_intact()
        text = output.text()
        if flooded:
            text += f"\n[killed: more than {_MAX_OUTPUT_FACTOR * self._max_output_bytes} bytes of output]\n"
        return CommandResult(text, 124 if timed_out else exit_code, timed_out)

    async def close(self) -> None:
        """End every process and delete everything, even if the caller is cancelled meanwhile."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._end_processes()
        finally:
            await self._delete()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise SandboxError("the sandbox is closed")

    async def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()
        while self._processes:
            await _end(self._processes.pop())


async def _end(process: SandboxProcess) -> int:
    try:
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            return await process.end()
    except TimeoutError:
        raise SandboxError(f"a sandboxed process (pid {process.pid}) cannot be killed") from None
