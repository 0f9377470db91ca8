"""The engine that asks a vLLM server of the worker's own, which outlives the task and serves all tasks there.

The first task that needs a model has its server started, see :mod:`airflow_vlm_provider.engines.vllm_leases`. It is
asked over HTTP like any other endpoint. What is special is that this engine knows what becomes of the server: when it
died or was replaced, the requests that were in flight are asked again once it is back.

One of them may be what kills it. Those that were lost :data:`SUSPECT_AFTER` times are therefore asked alone, see
:mod:`airflow_vlm_provider.engines.vllm_turns`; who is lost then has itself to blame, and is given up. The others are
answered.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.engines.pressure import first_size
from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from airflow_vlm_provider.engines.vllm_leases import Attached, Lease
from airflow_vlm_provider.engines.vllm_settings import KeeperSettings
from airflow_vlm_provider.engines.vllm_spec import DEFAULT_COMMAND, ServerSpec, influence, pick_gpus
from airflow_vlm_provider.engines.vllm_turns import POLL, Turns
from airflow_vlm_provider.errors import EngineError, TransientError, VLMError
from airflow_vlm_provider.types import Answer, Request

log = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_SECONDS = 0.5
# Once, where a request has killed the server before: it is only started again so many times.
SUSPECT_AFTER, SUSPECT_AGAIN_AFTER = 2, 1
# Even if it was never alone: no more often than a keeper starts the server again.
GIVEN_UP_AFTER = 5
# Whether the server is gone is for its keeper to tell, long before this.
_OUTAGE_SECONDS = 3600.0


@dataclass
class _Server:
    """The server as this task knows it, until it is lost."""

    attached: Attached
    engine: OpenAIEngine
    asking: set[asyncio.Future[Answer]] = field(default_factory=set)


class VLLMEngine:
    """Asks a model on a vLLM server of this worker, started if need be.

    :param model: Name on the Hugging Face hub, or a folder.
    :param folder: The worker's engine folder, where its servers are found.
    :param revision: Branch, tag or commit on the hub.
    :param engine_args: vLLM's own arguments, by its names.
    :param gpus: GPUs for the server, such as ``"0,1"``; None takes the worker's first, as many as it needs.
    :param command: What starts vLLM's OpenAI-compatible server.
    :param settings: How its keeper is to be, where this task starts it.
    :param holder: Who asks, for people who look at the servers of a worker: DAG, run, task.
    :param concurrency: Requests in flight at most.
    :param timeout: Seconds per request.
    :param detail: ``detail`` of every image; None leaves it to the server.
    """

    def __init__(
        self,
        *,
        model: str,
        folder: str | Path,
        revision: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        gpus: str | None = None,
        command: tuple[str, ...] = DEFAULT_COMMAND,
        settings: KeeperSettings | None = None,
        holder: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        timeout: float = 300.0,
        detail: str | None = None,
    ) -> None:
        self.model = model
        # The server does not run where the task does.
        self._served = str(Path(model).absolute()) if Path(model).is_dir() else model
        self.concurrency = concurrency
        self.takes_video = True
        self._folder = folder
        self._revision = revision
        self._args = dict(engine_args or {})
        self._gpus = gpus
        self._command = command
        self._settings = settings or KeeperSettings()
        self._holder = dict(holder or {})
        self._timeout = timeout
        self._detail = detail
        # What is wrong with it is to be said before anything runs; on which GPUs it will be is for the worker to say.
        ServerSpec(model=model, gpus=(), args=self._args)
        self._lease: Lease | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._stopped = threading.Event()
        self._server: asyncio.Future[_Server] | None = None
        self._asked: OpenAIEngine | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._turns: Turns | None = None
        self._suspect_after = SUSPECT_AFTER

    @property
    def window(self) -> int:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return self.concurrency if self._asked is None else self._asked.window

    @property
    def in_flight(self) -> int:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return 0 if self._asked is None else self._asked.in_flight

    @property
    def pressure(self) -> str | None:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return None if self._asked is None else self._asked.pressure

    def parameters(self) -> Mapping[str, Any]:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return {
            "engine": "vllm",
            "model": self.model,
            "revision": self._revision,
            "engine_args": influence(self._args),
            "detail": self._detail,
        }

    async def __aenter__(self) -> VLLMEngine:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="vlm-lease")
        self._stopped.clear()
        try:
            self._lease = await self._in_thread(self.make_lease)
            self._turns = Turns(self._lease.server, patience=self._timeout)
            self._server = asyncio.get_running_loop().create_future()
            self._server.set_result(await self._attach())
        except BaseException:
            await self._leave()
            raise
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            self._stopped.set()
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        await self._leave()

    async def ask(self, request: Request) -> Answer:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        lost = 0
        while True:
            if lost < self._suspect_after:
                asking, blamed = await self._ask_beside_others(request), False
            else:
                asking, blamed = await self._ask_alone(request)
            if not asking.cancelled():
                return asking.result()
            lost += 1
            if blamed or lost >= GIVEN_UP_AFTER:
                self._suspect_after = SUSPECT_AGAIN_AFTER
                raise TransientError(
                    f"The vLLM server of {self.model} was lost {lost} times while it worked on this request"
                    + (", the last time with no other request beside it." if blamed else "."),
                    attempts=lost,
                )

    async def _ask_beside_others(self, request: Request) -> asyncio.Future[Answer]:
        """Ask it with others beside it, see :meth:`_ask`."""
        turns = self._turns
        while True:
            # Before its turn, so that suspects come first when the server is back.
            await self._running()
            assert turns is not None
            async with turns.beside_others():
                # If it was lost just now, a suspect is not to wait for this one through the load.
                if self._server is None or self._server.done():
                    return await self._ask(await self._running(), request)

    async def _ask_alone(self, request: Request) -> tuple[asyncio.Future[Answer], bool]:
        """Ask it with no other beside it, see :meth:`_ask`; and whether none was to the end."""
        turns = self._turns
        assert turns is not None
        async with turns.alone() as turn:
            server = await self._current()
            turn.begin()
            asking = await self._ask(server, request)
            return asking, turn.is_alone

    async def _ask(self, server: _Server, request: Request) -> asyncio.Future[Answer]:
        """Ask the server: the answer, or a cancelled future if it was lost meanwhile."""
        asking = asyncio.ensure_future(server.engine.ask(request))
        server.asking.add(asking)
        try:
            await asyncio.wait((asking,))
        finally:
            asking.cancel()
            server.asking.discard(asking)
            self.takes_video = self.takes_video and server.engine.takes_video
        return asking

    async def _current(self) -> _Server:
        """The server, once it runs for certain.

        It may have been lost to another task's suspect, which that task knows already and this one does not. Who is asked
        there would be blamed for a loss before its time.
        """
        while True:
            server, future, lease = await self._running(), self._server, self._lease
            assert lease is not None
            # What can't be looked at now is for the watcher to give up, or to find again.
            with suppress(OSError):
                is_current = await self._in_thread(partial(lease.is_current, server.attached))
                if is_current and self._server is future:
                    return server
            await asyncio.sleep(POLL)

    async def _running(self) -> _Server:
        """The server, once it runs."""
        while True:
            server = self._server
            if server is None:
                raise EngineError("The engine is not open: use it as an asynchronous context manager.")
            if server.done():
                if (error := server.exception()) is not None:
                    # One of its own for each who asks: what is raised twice grows.
                    raise type(error)(str(error))
                return server.result()
            # Not awaited itself: cancelled here, it would be for all.
            await asyncio.wait((server,))

    def make_lease(self) -> Lease:
        """A claim on the server, which is not taken yet. Blocks for a moment.

        :raises ConfigError: the worker has not the GPUs that are asked for, or the engine folder is another user's.
        """
        spec = ServerSpec(
            model=self._served,
            revision=self._revision,
            args=self._args,
            gpus=pick_gpus(self._gpus, self._args),
            command=self._command,
        )
        folder = EngineFolder(self._folder)
        return Lease(folder, spec, settings=self._settings, holder=self._holder, say=log.info)

    async def _attach(self) -> _Server:
        """Wait for the server, and make ready to ask it.

        :raises ConfigError, EngineError: it can't be had.
        """
        lease = self._lease
        assert lease is not None
        attached = await self._in_thread(lambda: lease.attach(stopped=self._stopped.is_set))
        if attached is None:
            raise asyncio.CancelledError
        self._asked = engine = OpenAIEngine(
            base_url=f"{attached.url}/v1",
            api_key=attached.api_key,
            name=f"vLLM on this worker ({lease.server.key})",
            model=self._served,
            concurrency=self.concurrency,
            first_window=first_size(attached.tasks),
            timeout=self._timeout,
            detail=self._detail,
            outage_timeout=_OUTAGE_SECONDS,
            before_retry=partial(self._before_retry, attached),
        )
        return _Server(attached, await engine.__aenter__())

    async def _before_retry(self, attached: Attached) -> None:
        """Wait as long as the server is not the one that failed to answer, until the watcher sees that, too.

        Asked again by itself, a request would kill the next server without being counted as lost.
        """
        lease = self._lease
        assert lease is not None
        with suppress(OSError):
            while not await self._in_thread(partial(lease.is_current, attached)):  # noqa: ASYNC110 - it will be cancelled
                await asyncio.sleep(WATCH_SECONDS)

    async def _watch(self) -> None:
        """See to it that what is asked is the server that runs."""
        try:
            while True:
                await asyncio.sleep(WATCH_SECONDS)
                await self._follow()
        except Exception as error:
            if not isinstance(error, VLMError):
                log.exception("The vLLM server can't be watched any more")
                error = EngineError(f"The vLLM server can't be watched any more: {error}")
            lost, future = self._server, self._server
            if future is None or future.done():
                future = self._server = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            # Nobody may be asking.
            future.exception()
            if lost is not None and lost is not future:
                await self._drop(lost.result())

    async def _follow(self) -> None:
        """Go on with another server if the one that is asked was lost."""
        lease, future = self._lease, self._server
        assert lease is not None
        assert future is not None
        server = future.result()
        if await self._in_thread(lambda: lease.is_current(server.attached)):
            return
        log.warning("The vLLM server was lost; %d requests are asked again", len(server.asking))
        self._server = asyncio.get_running_loop().create_future()
        await self._drop(server)
        self._server.set_result(await self._attach())

    async def _drop(self, server: _Server) -> None:
        for asking in list(server.asking):
            asking.cancel()
        await server.engine.__aexit__(None, None, None)

    async def _leave(self) -> None:
        """Close and give back what there is."""
        self._stopped.set()
        future, self._server = self._server, None
        if future is not None:
            if not future.done():
                future.set_exception(EngineError("The engine is closed."))
            if future.exception() is None:
                await self._drop(future.result())
        lease, self._lease = self._lease, None
        threads, self._threads = self._threads, None
        if threads is not None:
            if lease is not None:
                threads.submit(lease.release)
            threads.shutdown(wait=False)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
