"""Looks at what a vLLM server tells of itself, for as long as it is asked.

Whether an endpoint is vLLM is found out by asking for ``/metrics`` beside ``/v1``, once and quietly: whoever answers
with anything else is not asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from airflow_vlm_provider.engines.client import transport_errors
from airflow_vlm_provider.engines.failures import public_url
from airflow_vlm_provider.engines.vllm_metrics import Metrics, read_metrics

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

# A server's answer costs it some milliseconds, and every task asks.
LOOK_SECONDS = 1.0
_TIMEOUT = 5.0


def metrics_url(endpoint: str) -> str | None:
    """Where a vLLM server that answers at this URL would tell of itself; None where that can't be one's.

    :param endpoint: Such as ``http://gpu-1:8000/v1/chat/completions``.
    """
    root, version, _ = endpoint.rpartition("/v1/")
    return f"{root}/metrics" if version and not urlsplit(endpoint).query else None


async def watch_server(
    client: AsyncOpenAI, url: str, *, busy: Callable[[], bool], tell: Callable[[Metrics | None], None]
) -> None:
    """Look again and again, until cancelled; returns when there is nothing to be seen.

    :param client: Asks; what it authorizes requests by may be asked for here, too.
    :param url: See :func:`metrics_url`.
    :param busy: Whether a look is worth it.
    :param tell: Takes what was seen; None while nothing is to be seen of a server that was seen before.
    """
    import anyio
    import openai

    lost: tuple[type[Exception], ...] = (openai.APIError, OSError, TimeoutError, *transport_errors())
    seen = False
    while True:
        await anyio.sleep(LOOK_SECONDS)
        if not busy():
            continue
        try:
            with anyio.fail_after(_TIMEOUT):
                text = await client.get(
                    url, cast_to=str, options={"max_retries": 0, "follow_redirects": False}
                )
        except openai.APIStatusError as error:
            if not seen:
                log.debug("%s answers with status %d: it is no vLLM's", public_url(url), error.status_code)
                return
            metrics = None
        except lost:
            metrics = None
        else:
            metrics = read_metrics(text)
            if metrics is None and not seen:
                log.debug("%s is no vLLM's", public_url(url))
                return
        seen = seen or metrics is not None
        tell(metrics)
