"""How much an engine may send: a window of requests in flight, rates per minute, and pauses that are asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from aiolimiter import AsyncLimiter

from airflow_vlm_provider.engines.failures import PassingError
from airflow_vlm_provider.engines.pressure import FIRST_SIZE, Ended, Pressure
from airflow_vlm_provider.engines.vllm_metrics import Metrics
from airflow_vlm_provider.engines.vllm_watch import metrics_url, watch_server
from airflow_vlm_provider.engines.window import Window
from airflow_vlm_provider.types import Answer, Request, Usage

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

_TOKENS_PER_MEDIUM = 1000
_TOKENS_PER_ANSWER = 256
_CHARACTERS_PER_TOKEN = 4
_HELD_SECONDS = 0.01
# Rates that are too low hold back nearly all requests; others now and then a few that come at once.
_BINDING_SHARE = 0.5


class Limits:
    """Lets requests through, first come first served.

    :param concurrency: Requests in flight at most: the largest size of :attr:`window`, which follows what the endpoint
        can take.
    :param first_window: Its size before anything is known of the endpoint.
    :param requests_per_minute: None is no limit.
    :param tokens_per_minute: Prompt and completion tokens together; None is no limit.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        first_window: int = FIRST_SIZE,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        self.pressure = Pressure(concurrency, first=first_window)
        self.window = Window(self.pressure.size)
        self._watcher: asyncio.Task[None] | None = None
        self._said = False
        self._let_through = self._held = 0
        # Seconds in which somebody waited for one of the buckets.
        self._waited = 0.0
        # The buckets are small, so that no minute sees much more than its due: a bucket of a whole minute would
        # let through twice the rate in the first one.
        self._requests = _bucket(requests_per_minute, seconds=1)
        self._tokens = _bucket(tokens_per_minute, seconds=10)
        self._order = asyncio.Lock()
        self._paused_until = 0.0
        self._closed = asyncio.Event()

    def watch(self, client: AsyncOpenAI, endpoint: str) -> None:
        """Look at what the server tells of itself, if it is vLLM, until :meth:`close`.

        :param endpoint: The URL that requests are sent to.
        """
        if url := metrics_url(endpoint):
            watching = watch_server(client, url, busy=lambda: self.pressure.in_flight > 0, tell=self._seen)
            self._watcher = asyncio.ensure_future(watching)

    async def watched(self, sending: Awaitable[Answer | Exception]) -> Answer | Exception:
        """Send a request, inside of :attr:`window`, and learn from how it ends what the endpoint can take."""
        now = asyncio.get_running_loop().time
        sent = self.pressure.send(now())
        ended: Ended = "failed"
        try:
            answer = await sending
            if isinstance(answer, Answer):
                ended = "answered"
            elif isinstance(answer, PassingError) and answer.reason in ("rate_limit", "timeout"):
                ended = "refused"
            return answer
        finally:
            self.pressure.end(sent, now(), ended)
            self._resize()

    async def permit(self, tokens: float) -> None:
        """Wait until one more request of so many tokens may be sent, or until :meth:`close`."""
        if self._requests or self._tokens or self._left_of_pause() > 0:
            # AsyncLimiter serves small amounts before large ones; the lock keeps the order.
            before = self._waited
            async with self._order:
                came = asyncio.get_running_loop().time()
                if self._requests and not self._closed.is_set():
                    await self._requests.acquire()
                while self._tokens and tokens > 0 and not self._closed.is_set():
                    part = min(tokens, self._tokens.max_rate)
                    await self._tokens.acquire(part)
                    tokens -= part
                self._waited += asyncio.get_running_loop().time() - came
                while (left := self._left_of_pause()) > 0 and not self._closed.is_set():
                    await self.sleep(left)
            # Behind those who came before, too, but for a pause that the endpoint has asked for.
            if self._waited - before > _HELD_SECONDS:
                self._held += 1
        self._let_through += 1

    def sentence(self) -> str | None:
        """What kept more requests from being in flight, and what would help; None if it is not known."""
        if self._held and self._held >= _BINDING_SHARE * self._let_through:
            return (
                f"{self._held} of {self._let_through} requests were held back by the connection's rates per minute. "
                "Larger ones (requests_per_minute, tokens_per_minute), if the endpoint allows them, would make this "
                "faster."
            )
        return self.pressure.sentence()

    def pause(self, seconds: float) -> None:
        """Send nothing for so long; a longer pause in force stays."""
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + seconds)

    async def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond :meth:`close`."""
        if not self._closed.is_set():
            waiter = asyncio.ensure_future(self._closed.wait())
            try:
                await asyncio.wait([waiter], timeout=seconds)
            finally:
                waiter.cancel()

    def close(self) -> None:
        """End every wait at once: there is nothing more to wait for."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.cancel()

    def _seen(self, metrics: Metrics | None) -> None:
        self.pressure.look(metrics)
        self._resize()

    def _resize(self) -> None:
        size = self.pressure.size
        if size != self.window.size:
            self.window.resize(size)
        if not self._said and self.pressure.is_limited and self.window.waiting:
            self._said = True
            log.info(
                "The endpoint can't take more for now: %d requests in flight, which follow its load", size
            )

    def _left_of_pause(self) -> float:
        return self._paused_until - asyncio.get_running_loop().time()


def _bucket(per_minute: float | None, *, seconds: float) -> AsyncLimiter | None:
    if per_minute is None:
        return None
    size = max(1.0, per_minute * seconds / 60)
    return AsyncLimiter(size, size * 60 / per_minute)


class TokenEstimate:
    """Guesses what a request will be billed, and learns from what earlier ones were.

    Endpoints that limit tokens per minute reserve ``max_tokens`` when a request arrives, however short the answer
    turns out: so only the prompt's share is learnt, and the answer's where there is no ``max_tokens``.
    """

    def __init__(self) -> None:
        self._guessed = 0.0
        self._billed = 0.0
        self._answers = 1
        self._answer_tokens = float(_TOKENS_PER_ANSWER)

    def of(self, request: Request, max_tokens: int | None) -> float:
        """Tokens that this request is likely to take."""
        correction = self._billed / self._guessed if self._guessed and self._billed else 1.0
        answer = max_tokens if max_tokens is not None else self._answer_tokens / self._answers
        return _prompt_guess(request) * correction + answer * request.n

    def learn(self, request: Request, usage: Usage) -> None:
        """Take note of what a request was billed."""
        if usage.prompt_tokens:
            self._guessed += _prompt_guess(request)
            self._billed += usage.prompt_tokens
        self._answers += request.n
        self._answer_tokens += usage.completion_tokens


def _prompt_guess(request: Request) -> float:
    characters, media = len(request.system or ""), 0
    for part in request.parts:
        if isinstance(part, str):
            characters += len(part)
        else:
            media += 1
    return characters / _CHARACTERS_PER_TOKEN + media * _TOKENS_PER_MEDIUM
