"""Servers in virtual time, and tasks that ask them through the window that an engine has.

A server works on so many requests at once and queues the others, as vLLM does; it may also turn some away. Nothing
is sent anywhere: a test of minutes with thousands of requests takes a second.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from airflow_vlm_provider.engines.pressure import FIRST_SIZE, Ended, Pressure
from airflow_vlm_provider.engines.vllm_metrics import Metrics
from airflow_vlm_provider.engines.window import Window

LOOK_SECONDS = 1.0


@dataclass
class Server:
    """A server that works on several requests at once, first come first served.

    :param slots: How many it works on at once.
    :param seconds: How long it works on one, by a number that is drawn and how many it works on with it.
    :param cache: Pieces of cache; None for as much as it takes.
    :param pieces: How many a request takes, by a number that is drawn.
    :param on_the_way: Seconds from sending to the queue (preprocessing, network).
    :param refuses_from: So many at once are taken, more are turned away; None takes all.
    :param retry_after: Seconds that it then asks to wait.
    """

    slots: int
    seconds: Callable[[random.Random, int], float] = lambda draw, running: 1.0
    cache: int | None = None
    pieces: Callable[[random.Random], int] = lambda draw: 1
    on_the_way: float = 0.0
    refuses_from: int | None = None
    retry_after: float = 0.0
    running: int = 0
    used: int = 0
    answered: int = 0
    refused: int = 0
    queue: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)
    draw: random.Random = field(default_factory=lambda: random.Random(7))

    def metrics(self) -> Metrics:
        cache = self.used / self.cache if self.cache else 0.3 * self.running / max(1, self.slots)
        return Metrics(self.running, len(self.queue), cache, progress=float(self.answered))

    async def ask(self) -> bool:
        """Work on one request; False when it is turned away."""
        if self.on_the_way:
            await asyncio.sleep(self.on_the_way * self.draw.uniform(0.5, 1.5))
        if self.refuses_from is not None and self.running + len(self.queue) >= self.refuses_from:
            self.refused += 1
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = self.pieces(self.draw), turn
        self.queue.append(place)
        self._start()
        try:
            await turn
        finally:
            # Of what nobody waits for any more, vLLM drops what it has not begun.
            if turn.cancelled() and place in self.queue:
                self.queue.remove(place)
        return True

    def _start(self) -> None:
        while self.queue and self.running < self.slots:
            pieces, turn = self.queue[0]
            if self.cache and self.running and self.used + pieces > self.cache:
                return
            self.queue.popleft()
            self.running += 1
            self.used += pieces
            loop = asyncio.get_running_loop()
            loop.call_later(self.seconds(self.draw, self.running), self._end, pieces, turn)

    def _end(self, pieces: int, turn: asyncio.Future[None]) -> None:
        self.running -= 1
        self.used -= pieces
        self.answered += 1
        if not turn.done():
            turn.set_result(None)
        self._start()


class Task:
    """A task with more to ask than fits, that asks through a window.

    :param most: The largest window.
    :param fixed: Whether the window always has that size.
    :param looks: Whether it looks at the server's metrics.
    :param samples: How many samples it works on at once at most, as a source would bound it.
    :param first: The window to begin with.
    :param total: How much it has to ask.
    :param timeout: Seconds after which it gives a request up, and asks again.
    """

    def __init__(
        self,
        server: Server,
        *,
        most: int = 128,
        fixed: bool = False,
        looks: bool = True,
        samples: int = 1000,
        first: int = FIRST_SIZE,
        total: float = math.inf,
        timeout: float | None = None,
    ) -> None:
        self.server = server
        self.pressure = Pressure(most, first=first)
        self.window = Window(most if fixed else self.pressure.size)
        self.answered = self.timeouts = 0
        self.done = asyncio.Event()
        self.sizes: list[int] = []
        self._fixed = fixed
        self._looks = looks
        self._paused_until = 0.0
        self._running: list[asyncio.Task[None]] = []
        self._samples = samples
        self._left = self._total = total
        self._timeout = timeout

    def start(self) -> None:
        self._running = [asyncio.create_task(self._go_on()) for _ in range(min(self._samples, 4 * 128))]
        self._running.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        while self._left > 0:
            self._left -= 1
            async with self.window:
                if (left := self._paused_until - loop.time()) > 0:
                    await asyncio.sleep(left)
                sent = self.pressure.send(loop.time())
                ended: Ended = "failed"
                try:
                    taken = await asyncio.wait_for(self.server.ask(), self._timeout)
                    ended = "answered" if taken else "refused"
                except asyncio.TimeoutError:
                    ended = "refused"
                    self.timeouts += 1
                finally:
                    self.pressure.end(sent, loop.time(), ended)
                    self._resize()
            if ended == "answered":
                self.answered += 1
                if self.answered == self._total:
                    self.done.set()
                continue
            self._left += 1
            if self.server.retry_after:
                self._paused_until = loop.time() + self.server.retry_after
            else:
                await asyncio.sleep(self.server.draw.uniform(0, 2))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._looks:
                self.pressure.look(self.server.metrics())
            self._resize()
            self.sizes.append(self.window.size)

    def _resize(self) -> None:
        if not self._fixed:
            self.window.resize(self.pressure.size)


async def answered_in(tasks: list[Task], seconds: float) -> list[int]:
    """How many answers each task gets in the next seconds."""
    before = [task.answered for task in tasks]
    await asyncio.sleep(seconds)
    return [task.answered - number for task, number in zip(tasks, before, strict=True)]
