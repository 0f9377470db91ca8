"""Looking at a server's figures: what is asked, when it is given up, and what is told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from airflow_vlm_provider.engines.vllm_metrics import Metrics
from airflow_vlm_provider.engines.vllm_watch import metrics_url, watch_server
from tests.support.virtual_time import run_in_virtual_time

BUSY = "vllm:num_requests_running 3.0\nvllm:num_requests_waiting 2.0\nvllm:kv_cache_usage_perc 0.5\n"
URL = "http://gpu-1:8000/metrics"
GONE = openai.APIConnectionError(request=httpx.Request("GET", URL))


def _status(code: int) -> openai.APIStatusError:
    response = httpx.Response(code, request=httpx.Request("GET", URL))
    return openai.APIStatusError("no", response=response, body=None)


class Client:
    """Answers what it is told to, in order, the last again and again."""

    def __init__(self, *answers: str | Exception | None) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, Any]] = []

    async def get(self, url: str, *, cast_to: type, options: dict[str, Any]) -> str:
        self.asked.append((url, options))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await asyncio.sleep(3600)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def _watch(client: Client, *, seconds: float, busy: bool = True) -> list[Metrics | None]:
    told: list[Metrics | None] = []

    async def main() -> None:
        watching = asyncio.ensure_future(
            watch_server(client, URL, busy=lambda: busy, tell=told.append)  # type: ignore[arg-type]
        )
        await asyncio.wait([watching], timeout=seconds)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run_in_virtual_time(main())
    return told


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://gpu-1:8000/v1/chat/completions", URL),
        ("https://models.example/vllm/v1/chat/completions", "https://models.example/vllm/metrics"),
        ("https://x.example/openai/deployments/m/chat/completions", None),
        ("https://x.example/v1/chat/completions?api-version=2", None),
    ],
)
def test_where_a_server_may_tell_of_itself(endpoint, url):
    assert metrics_url(endpoint) == url


def test_a_server_that_tells_of_itself_is_looked_at_again_and_again():
    client = Client(BUSY)
    assert _watch(client, seconds=5.5) == [Metrics(3, 2, 0.5, 0)] * 5
    # A redirection could lead the API key elsewhere.
    assert client.asked[0] == (URL, {"max_retries": 0, "follow_redirects": False})


@pytest.mark.parametrize("answer", ["<html>", "python_info 1.0\n", _status(404), _status(401), _status(302)])
def test_whoever_answers_anything_else_is_not_asked_again(answer):
    client = Client(answer)
    assert _watch(client, seconds=10) == []
    assert len(client.asked) == 1


def test_a_server_that_was_seen_and_is_gone_is_told_of_and_looked_for():
    for lost in (GONE, _status(503), "", None):
        told = _watch(Client(BUSY, lost, BUSY), seconds=9)
        assert told[:3] == [Metrics(3, 2, 0.5, 0), None, Metrics(3, 2, 0.5, 0)], lost


def test_a_server_that_can_not_be_reached_yet_is_looked_for():
    assert _watch(Client(GONE, GONE, BUSY), seconds=3.5)[-1] == Metrics(3, 2, 0.5, 0)


def test_a_server_that_this_task_does_not_ask_is_left_alone():
    client = Client(BUSY)
    assert _watch(client, seconds=10, busy=False) == []
    assert client.asked == []
