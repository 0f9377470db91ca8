"""Lines on their way to the store: collected, written many at a time beside whatever goes on, and never too many.

Invariants:

- No more than ``FlushPolicy.answers`` lines, or about ``FlushPolicy.bytes`` bytes, wait for the store before whoever
  appends has to wait too; of all that share a window, together.
- Lines become durable in the order in which they were appended, so that counting tells which are.
- A line is given up only by :meth:`~WriteBehind.close`, and then it is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from airflow_vlm_provider.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")


class InThread(Protocol):
    """Runs what blocks in a thread, and returns what it returned."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]: ...


@dataclass(frozen=True, slots=True)
class FlushPolicy:
    """How much may be lost when a task is killed: answers that have to be asked for again.

    Writing begins at half of ``answers`` or ``bytes``, and goes on beside the asking.

    :param answers: Most answers that are kept before they are durable.
    :param bytes: About how many bytes of them.
    :param seconds: How long one is kept before it is written, though others are few.
    :raises ConfigError: one of them is not above 0.
    """

    answers: int = 512
    bytes: int = 4 * 1024 * 1024
    seconds: float = 5.0

    def __post_init__(self) -> None:
        for name, kind in (("answers", int), ("bytes", int), ("seconds", (int, float))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
                what = "a number" if name == "seconds" else "a whole number"
                raise ConfigError(f"The journal's flush policy has {name}={value!r}; give {what} above 0.")


class Window:
    """What waits for the store, of all that share it: a task that is killed loses this much, however many shards are open.

    :param policy: How much that may be.
    """

    def __init__(self, policy: FlushPolicy) -> None:
        self.policy = policy
        self._lines = 0
        self._bytes = 0
        self._sharers: set[WriteBehind] = set()
        self._smaller = asyncio.Event()

    def join(self, sharer: WriteBehind) -> None:
        self._sharers.add(sharer)

    def leave(self, sharer: WriteBehind, lines: int, size: int) -> None:
        """Count no more what a sharer leaves behind, which nobody can save any more."""
        self._sharers.discard(sharer)
        self.shrink(lines, size)

    def grow(self, size: int) -> None:
        """Count one more line."""
        self._lines += 1
        self._bytes += size

    def shrink(self, lines: int, size: int) -> None:
        """Count lines no more: they are durable."""
        self._lines -= lines
        self._bytes -= size
        self._smaller.set()

    @property
    def is_half_full(self) -> bool:
        return 2 * self._lines >= self.policy.answers or 2 * self._bytes >= self.policy.bytes

    @property
    def is_over(self) -> bool:
        return self._lines > self.policy.answers or self._bytes > self.policy.bytes

    async def wait(self) -> None:
        """Have everybody write what they have, and wait until something of it is durable."""
        self._smaller.clear()
        for sharer in tuple(self._sharers):
            sharer.hurry()
        await self._smaller.wait()


class WriteBehind:
    """Writes lines in the background. Belongs to the event loop's thread.

    :param write: Makes lines durable, all or none; it blocks, and is called in a thread, never twice at once (but
        once more when it does not return in time for :meth:`close`).
    :param window: When it is called, and how much may wait for it.
    :param in_thread: Runs what blocks.
    :param on_failure: Called once, in the event loop, when lines can't be written: no more should be paid for.
    """

    def __init__(
        self,
        write: Callable[[Sequence[bytes]], None],
        *,
        window: Window,
        in_thread: InThread,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._write = write
        self._window = window
        window.join(self)
        self._in_thread = in_thread
        self._on_failure = on_failure
        self._buffer: list[bytes] = []
        self._buffer_bytes = 0
        self._waiting_bytes = 0
        self._appended = 0
        self._durable = 0
        self._hurry = False
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many lines are not durable yet."""
        return self._appended - self._durable

    async def append(self, line: bytes) -> None:
        """Take a line; return at once, unless too many are waiting: then when there is room again.

        Whatever happens, also when this is cancelled or raises, the line is kept to be written.

        :raises Exception: lines can't be written; what :meth:`close` or the store said.
        """
        if not self._buffer and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._window.policy.seconds, self._write_soon, True)
        self._buffer.append(line)
        self._buffer_bytes += len(line)
        self._waiting_bytes += len(line)
        self._window.grow(len(line))
        self._appended += 1
        self._write_soon()
        self._check()
        while self._window.is_over:
            await self._window.wait()
            self._check()

    async def flush(self) -> None:
        """Make everything durable that was appended.

        :raises Exception: lines can't be written; what :meth:`close` or the store said.
        """
        target = self._appended
        self._check()
        while self._durable < target:
            self._write_soon(True)
            await self._settled()

    async def close(self, *, seconds: float) -> str | None:
        """Write what was not written yet, also after a failure, if that can be done in so many seconds.

        :return: Why lines were given up; None when none was.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        self._closed = True
        try:
            if self._writing is not None:
                await asyncio.wait((self._writing,), timeout=seconds)
            if self._writing is None and self._buffer:
                await asyncio.wait((self._start(),), timeout=max(0.0, deadline - loop.time()))
        finally:
            self._stop_timer()
            if self._writing is not None:
                self._writing.cancel()
            self._window.leave(self, self.waiting, self._waiting_bytes)
        if not self.waiting:
            return None
        if self._failure is None:
            return f"the store took longer than {seconds} s"
        return f"{type(self._failure).__name__}: {self._failure}"

    def hurry(self) -> None:
        """Write now what there is."""
        self._write_soon(True)

    def _write_soon(self, hurry: bool = False) -> None:
        """Begin to write what is buffered when it is enough, or in a hurry; after what is being written now."""
        self._hurry |= hurry and bool(self._buffer)
        if self._writing is None and self._failure is None and not self._closed and self._is_due():
            self._start()

    def _is_due(self) -> bool:
        return bool(self._buffer) and (self._hurry or self._window.is_half_full)

    def _start(self) -> asyncio.Task[None]:
        """Begin to write what is buffered."""
        batch, size = self._buffer, self._buffer_bytes
        self._buffer, self._buffer_bytes = [], 0
        self._hurry = False
        self._stop_timer()
        self._writing = asyncio.create_task(self._write_lines(batch))
        # Not the task's own doing, which it may be cancelled before it has begun.
        self._writing.add_done_callback(lambda task: self._ended(task, batch, size))
        return self._writing

    async def _write_lines(self, lines: Sequence[bytes]) -> None:
        await self._in_thread(lambda: self._write(lines))

    def _ended(self, task: asyncio.Task[None], batch: list[bytes], size: int) -> None:
        self._writing = None
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            self._durable += len(batch)
            self._waiting_bytes -= size
            self._window.shrink(len(batch), size)
            self._write_soon()
            return
        self._buffer[:0] = batch
        self._buffer_bytes += size
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            # Whoever waits for room is told why there will be none.
            self._window.shrink(0, 0)
            if not self._closed:
                self._on_failure(error)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("The journal is closed; what is appended to it now is lost.")

    async def _settled(self) -> None:
        """Wait until what is being written is durable, or could not be written."""
        # Not awaited itself: whoever waits may be cancelled, and the writing must not be.
        if self._writing is not None:
            await asyncio.wait((self._writing,))
        self._check()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
