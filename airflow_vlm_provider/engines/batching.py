"""Gathers requests of many tasks into batches for a model that answers one batch at a time.

Two threads work for the event loop: one loads requests and puts the next batch together while the other runs the
model on the present one. What goes wrong with a batch is brought down to the request at fault: a batch that is too
large for the memory is halved, and one that fails otherwise is split until the culprit stands alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from airflow_vlm_provider.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Batch = TypeVar("Batch")
Result = TypeVar("Result")
T = TypeVar("T")


class BatchTooLargeError(Exception):
    """The model's memory does not hold this batch. Raised by ``run``, which has freed what it took."""


@dataclass(eq=False)
class Ticket(Generic[Loaded, Result]):
    """A loaded request that waits for its answer.

    :param weight: How many of the batch's places it takes.
    """

    loaded: Loaded
    group: Hashable
    weight: int
    future: asyncio.Future[Result]

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the answer any more. May be read from any thread."""
        return self.future.done()


class Batcher(Generic[Item, Loaded, Batch, Result]):
    """Hands requests to a model in batches, first come, first served.

    The oldest request decides what goes into the next batch: it, and those after it that are of its group, as many
    as there are places. A batch goes off when it is full, or when the model has nothing to do and no more requests
    are on their way.

    :param load: Makes one request ready. Runs in the loading thread; what it raises is that request's answer.
    :param group: Only loaded requests of equal groups share a batch; they are of equal weight, too.
    :param collate: Puts a batch together. Runs in the loading thread.
    :param run: Answers a batch, in order. Runs in the model thread and returns soon after every ticket of its
        batch is abandoned.
    :param blame: Makes of what ``collate`` or ``run`` raised for a single request the error that its caller gets.
    :param size: Places in a batch; shrinks, and stays small, when memory runs out.
    :param in_flight: How many requests are loaded, waiting or running at most; more wait unloaded.
    :param linger: Seconds that an idle model waits after a request for others to join it.
    """

    def __init__(
        self,
        *,
        load: Callable[[Item], Loaded],
        group: Callable[[Loaded], Hashable],
        collate: Callable[[Sequence[Loaded]], Batch],
        run: Callable[[Sequence[Ticket[Loaded, Result]], Batch], Sequence[Result]],
        blame: Callable[[Exception], Exception],
        size: int,
        in_flight: int,
        linger: float,
    ) -> None:
        self.size = size
        self._load = load
        self._group = group
        self._collate = collate
        self._run = run
        self._blame = blame
        self._linger = linger
        self._slots = asyncio.Semaphore(in_flight)
        self._loading_thread = ThreadPoolExecutor(1, thread_name_prefix="vlm-load")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="vlm-model")
        self._loading = 0
        self._waiting: deque[Ticket[Loaded, Result]] = deque()
        self._unanswered: set[Ticket[Loaded, Result]] = set()
        self._changed = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._failure: str | None = None

    @property
    def in_flight(self) -> int:
        """How many requests are loaded, waiting or running."""
        return self._loading + len(self._unanswered)

    async def in_model_thread(self, function: Callable[[], T]) -> T:
        """Run something in the thread that owns the model."""
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, function)

    async def submit(self, item: Item, *, weight: int = 1) -> Result:
        """Answer one request.

        :param weight: How many places of a batch it takes. One that takes more than there are goes alone.
        :raises EngineError: the model is gone, or the batcher was closed.
        """
        if self._pump is None:
            self._pump = asyncio.create_task(self._keep_running())
        async with self._slots:
            self._check()
            ticket = await self._loaded(item, weight)
            self._unanswered.add(ticket)
            try:
                return await ticket.future
            finally:
                self._unanswered.discard(ticket)
                self._changed.set()

    async def stop(self) -> None:
        """Stop the running batch and fail whatever waits for an answer; the threads live on."""
        self._fail("the engine was closed")
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        if self._running is not None:
            await asyncio.wait([self._running])

    def end_threads(self) -> None:
        """Let both threads end as soon as they are done with what they are at, without waiting for it."""
        self._loading_thread.shutdown(wait=False, cancel_futures=True)
        self._model_thread.shutdown(wait=False, cancel_futures=True)

    async def _loaded(self, item: Item, weight: int) -> Ticket[Loaded, Result]:
        loop = asyncio.get_running_loop()
        self._loading += 1
        try:
            loaded = await loop.run_in_executor(self._loading_thread, self._load, item)
        finally:
            self._loading -= 1
            self._changed.set()
        self._check()
        ticket: Ticket[Loaded, Result] = Ticket(loaded, self._group(loaded), weight, loop.create_future())
        self._waiting.append(ticket)
        return ticket

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                tickets = await self._next_batch()
                prepared = await loop.run_in_executor(self._loading_thread, self._try_collate, tickets)
                if self._running is not None:
                    await asyncio.wait([self._running])
                self._running = asyncio.create_task(self._answer(tickets, prepared))
                # A batch that is put together too early would be a small one, see `_next_batch`.
                self._running.add_done_callback(lambda _: self._changed.set())
        except Exception as error:
            log.exception("The batching of requests broke")
            self._fail(f"{type(error).__name__}: {error}")

    async def _next_batch(self) -> list[Ticket[Loaded, Result]]:
        """The oldest request and those that go with it, once it is time."""
        linger: float | None = None
        while True:
            self._changed.clear()
            while self._waiting and self._waiting[0].abandoned:
                self._waiting.popleft()
            batch = self._oldest_group()
            full = bool(batch) and sum(ticket.weight for ticket in batch) + batch[0].weight > self.size
            idle = self._running is None or self._running.done()
            # More could still join: wait for a sign of it, or, with nothing to do, for a moment.
            if full or (batch and linger is not None):
                for ticket in batch:
                    self._waiting.remove(ticket)
                return batch
            linger = self._linger if batch and idle and not self._loading else None
            try:
                await asyncio.wait_for(self._changed.wait(), linger)
                linger = None
            except asyncio.TimeoutError:
                continue

    def _oldest_group(self) -> list[Ticket[Loaded, Result]]:
        batch: list[Ticket[Loaded, Result]] = []
        places = 0
        for ticket in self._waiting:
            if ticket.abandoned or (batch and ticket.group != batch[0].group):
                continue
            if batch and places + ticket.weight > self.size:
                break
            batch.append(ticket)
            places += ticket.weight
        return batch

    def _try_collate(self, tickets: Sequence[Ticket[Loaded, Result]]) -> Batch | None:
        try:
            return self._collate([ticket.loaded for ticket in tickets])
        except Exception:
            # Found again, and brought down to the request at fault, when it is the batch's turn.
            return None

    async def _answer(self, tickets: list[Ticket[Loaded, Result]], prepared: Batch | None) -> None:
        loop = asyncio.get_running_loop()

        def settle(ticket: Ticket[Loaded, Result], outcome: Result | Exception) -> None:
            loop.call_soon_threadsafe(_set, ticket.future, outcome)

        try:
            await loop.run_in_executor(self._model_thread, self._settle_all, tickets, prepared, settle)
        except EngineError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("A batch broke where it should not have")
            self._fail(f"{type(error).__name__}: {error}")

    def _settle_all(
        self,
        tickets: list[Ticket[Loaded, Result]],
        prepared: Batch | None,
        settle: Callable[[Ticket[Loaded, Result], Result | Exception], None],
    ) -> None:
        """Answer every ticket, in the model thread, in as few batches as memory and errors allow."""
        if all(ticket.abandoned for ticket in tickets):
            return
        places = sum(ticket.weight for ticket in tickets)
        # Put together before the memory proved too small for it.
        halve = len(tickets) > 1 and places > self.size
        failure: Exception | None = None
        if not halve:
            try:
                if prepared is None:
                    prepared = self._collate([ticket.loaded for ticket in tickets])
                for ticket, result in zip(tickets, self._run(tickets, prepared), strict=True):
                    settle(ticket, result)
                return
            except EngineError:
                raise
            except Exception as error:
                # The traceback's frames would keep alive whatever filled the memory.
                failure = error.with_traceback(None)
        prepared = None
        if len(tickets) == 1 and failure is not None:
            settle(tickets[0], self._blame(failure))
            return
        if isinstance(failure, ConfigError):
            for ticket in tickets:
                settle(ticket, failure)
            return
        if isinstance(failure, BatchTooLargeError) and places // 2 < self.size:
            self.size = max(1, places // 2)
            log.warning("Memory does not hold a batch of %d; from now on at most %d", places, self.size)
        middle = (len(tickets) + 1) // 2
        for half in (tickets[:middle], tickets[middle:]):
            self._settle_all(half, None, settle)

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(self._failure)

    def _fail(self, message: str) -> None:
        """Nothing is answered any more: neither what waits now nor what comes later."""
        if self._failure is None:
            self._failure = message
        self._waiting.clear()
        for ticket in self._unanswered:
            _set(ticket.future, EngineError(self._failure))


def _set(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
