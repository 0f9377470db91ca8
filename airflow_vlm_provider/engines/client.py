"""The HTTP client under the engine: how it is made, and what can be said about it before anything is sent."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from airflow_vlm_provider.engines.failures import public_url
from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    from openai import AsyncOpenAI


def make_client(
    *,
    base_url: str,
    api_key: str | None = None,
    timeout: float = 60.0,
    headers: Mapping[str, str] | None = None,
) -> AsyncOpenAI:
    """Make the client that the engine works best with: aiohttp below (a third less CPU), no retries of its own.

    :param base_url: The endpoint's root, such as ``https://api.openai.com/v1``.
    :param api_key: None for an endpoint that asks for none.
    :param timeout: Seconds per request.
    :param headers: Sent with every request.
    """
    from openai import AsyncOpenAI, DefaultAioHttpClient, DefaultAsyncHttpxClient, Timeout

    # A host that drops packets is told from a slow model long before the model's time is over.
    timeouts = Timeout(timeout, connect=min(timeout, 10.0))
    try:
        http_client = DefaultAioHttpClient(timeout=timeouts)
    except RuntimeError:  # aiohttp is not installed
        http_client = DefaultAsyncHttpxClient(timeout=timeouts)
    return AsyncOpenAI(
        base_url=base_url,
        # An empty key would make the client look for one in the environment, and send it wherever this goes.
        api_key=api_key or "EMPTY",
        timeout=timeouts,
        max_retries=0,
        default_headers=dict(headers or {}),
        http_client=http_client,
    )


def transport_errors() -> tuple[type[Exception], ...]:
    """What aiohttp raises past its adapter, if it is the transport: responses that are no HTTP, for one."""
    aiohttp = sys.modules.get("aiohttp")
    return (aiohttp.ClientError,) if aiohttp else ()


def own_headers(client: AsyncOpenAI) -> dict[str, str]:
    """The headers that a client was given, without those that it always sends."""
    return {
        name: value
        for name, value in client.default_headers.items()
        if isinstance(value, str)
        and name.lower() not in ("accept", "content-type", "user-agent")
        and not name.lower().startswith("x-stainless")
    }


def check_address(name: str, url: str) -> None:
    """Tell an address that nothing can be sent to before it is tried for minutes.

    :raises ConfigError: it is none.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"{name}: {public_url(url)!r} is no address of an endpoint. Set the connection's host to one such as "
            "https://api.openai.com/v1."
        )


def check_headers(name: str, api_key: str, headers: Mapping[str, str]) -> None:
    """Tell values that no header can carry; an HTTP library would, too, but it would quote the secret.

    :raises ConfigError: there is one.
    """
    if not re.fullmatch(r"[\x21-\x7e]*", api_key):
        raise ConfigError(
            f"{name}: the API key holds characters that no header can carry, such as a line break or a space in "
            "its middle. Set the connection's password again."
        )
    for header, value in headers.items():
        if not re.fullmatch(r"[\x20-\x7e\t]*", value):
            raise ConfigError(
                f"{name}: the value of header {header!r} holds characters that no header can carry."
            )


def check_positive(name: str, **values: float | None) -> None:
    """See that values that are given are above 0.

    :raises ConfigError: one is not.
    """
    for parameter, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: {parameter} must be more than 0, not {value!r}.")
