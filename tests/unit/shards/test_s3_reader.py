"""Servers that speak S3 loosely; the integration tests have a real one behind connections that break."""

from __future__ import annotations

import io
from typing import Any

import pytest

from airflow_vlm_provider.shards.s3_reader import ATTEMPTS, ResumingReader
from airflow_vlm_provider.shards.stores import ObjectChangedError

DATA = b"0123456789"


class LooseServer:
    """Answers with bodies that end after a few bytes, and knows no If-Match and, if so told, no Range.

    :param bodies: What each response's body holds, whatever its head says.
    """

    def __init__(self, bodies: list[bytes], etags: list[str], *, knows_range: bool = True) -> None:
        self.responses = iter(zip(bodies, etags, strict=True))
        self.knows_range = knows_range
        self.asked: list[dict[str, str]] = []

    def __call__(self, **conditions: str) -> dict[str, Any]:
        self.asked.append(conditions)
        body, etag = next(self.responses)
        start = int(conditions.get("Range", "bytes=0-")[6:-1]) if self.knows_range else 0
        return {"ETag": etag, "ContentLength": len(DATA) - start, "Body": io.BytesIO(body)}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_vlm_provider.shards.s3_reader.FIRST_WAIT_S", 0)


def test_a_body_that_just_ends_is_resumed() -> None:
    server = LooseServer([DATA[:4], DATA[4:5], b"", DATA[5:]], ["a"] * 4)
    assert ResumingReader(server, uri="s3://b/a").read() == DATA
    assert [each.get("Range") for each in server.asked] == [None, "bytes=4-", "bytes=5-", "bytes=5-"]


def test_a_server_without_if_match_cannot_splice_two_versions() -> None:
    reader = ResumingReader(LooseServer([DATA[:4], b"xxxxxx"], ["a", "b"]), uri="s3://b/a")
    with pytest.raises(ObjectChangedError):
        reader.read()


def test_a_server_without_range_cannot_repeat_the_beginning() -> None:
    server = LooseServer([DATA[:4], *[DATA] * ATTEMPTS], ["a"] * (ATTEMPTS + 1), knows_range=False)
    with pytest.raises(ConnectionError, match="range"):
        ResumingReader(server, uri="s3://b/a").read()


def test_closing_closes_the_body() -> None:
    body = io.BytesIO(DATA)
    reader = ResumingReader(lambda: {"ETag": "a", "ContentLength": 10, "Body": body}, uri="s3://b/a")
    assert io.BufferedReader(reader, 4).read(2) == DATA[:2]
    reader.close()
    assert body.closed
