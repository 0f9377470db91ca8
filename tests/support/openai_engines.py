"""What tests of the engine for OpenAI-compatible endpoints share: requests, engines, and asking them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.types import Media, Request
from tests.support.stub_endpoint import StubServer

T = TypeVar("T")
KEY = "sk-very-secret-0123456789"
NAME = "connection 'vlm_default'"
SCHEMA = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}


def picture(index: int) -> bytes:
    """Bytes that stand for a picture, another one for each index."""
    return b"\xff\xd8picture %d" % index + bytes(2000)


def request_about(index: int = 0, **more: Any) -> Request:
    """A request about one picture."""
    media = Media("image", "image/jpeg", picture(index), f"{index}.jpg")
    return Request(**{"system": "Tag.", "parts": (media, "Tag this image."), "schema": SCHEMA, **more})


def engine_for(stub: StubServer, **options: Any) -> OpenAIEngine:
    """An engine that asks the stub."""
    return OpenAIEngine(
        **{"base_url": stub.base_url, "api_key": KEY, "model": "m", "name": NAME, "timeout": 20.0, **options}
    )


def run_engine(engine: OpenAIEngine, use: Callable[[OpenAIEngine], Awaitable[T]]) -> T:
    """Enter the engine and use it."""

    async def main() -> T:
        async with engine:
            return await use(engine)

    return asyncio.run(main())


def ask_all(engine: OpenAIEngine, requests: list[Request]) -> list[Any]:
    """The answers or errors, in the order of the requests, which are all asked at once."""

    async def use(engine: OpenAIEngine) -> list[Any]:
        return await asyncio.gather(*map(engine.ask, requests), return_exceptions=True)

    return run_engine(engine, use)


def ask(engine: OpenAIEngine, request: Request | None = None) -> Any:
    """The answer or error of one request."""
    return ask_all(engine, [request or request_about()])[0]


async def until(stub: StubServer, condition: Callable[[dict[str, Any]], Any]) -> None:
    """Wait until the endpoint's figures are as they should be."""
    # The endpoint is another process: there is no event to wait for.
    while not condition(await asyncio.to_thread(stub.stats)):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
