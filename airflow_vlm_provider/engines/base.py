"""The contract of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from airflow_vlm_provider.types import Answer, Request


class Engine(Protocol):
    """Answers requests, many at a time: an asynchronous context manager around whatever it holds open.

    The engine bounds how many requests are in flight and retries what is transient; callers may await
    :meth:`ask` for as many requests at once as they like.
    """

    model: str
    """The model that is asked."""

    concurrency: int
    """How many requests the engine keeps in flight at most; the runner prepares a little more than that."""

    @property
    def window(self) -> int:
        """How many requests it keeps in flight at the moment: at most :attr:`concurrency`."""

    @property
    def in_flight(self) -> int:
        """How many requests are under way at the moment: not those that it still holds back, for whatever reason."""

    @property
    def pressure(self) -> str | None:
        """What kept more requests from being in flight, and what would help, in a sentence; None if not known."""

    @property
    def takes_video(self) -> bool:
        """Whether a video may be sent as such, as far as is known; otherwise its frames are sent as images."""

    def parameters(self) -> Mapping[str, Any]:
        """What decides an answer besides the request, as JSON values: model, revision, default sampling.

        Part of the fingerprint, so never the endpoint, the API key, timeouts or the concurrency.
        """

    async def ask(self, request: Request) -> Answer:
        """Answer one request whose media are loaded.

        :raises SampleError: the request can't be answered for its own sake (refused, too long, bad media).
        :raises NoVideoError: it holds a video, and the model takes none, as turns out now.
        :raises TransientError: it could not be answered within the retries.
        :raises EngineError: the engine is gone.
        :raises ConfigError: the key, the model or a parameter is wrong.
        """

    async def __aenter__(self) -> Engine: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
