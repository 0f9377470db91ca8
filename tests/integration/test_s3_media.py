from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import MediaRef
from demo.s3_server import S3Server, start_s3
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.images import encode, photo
from tests.support.raw_http import answer, raw_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

JPEG = encode(photo(), "JPEG")
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with start_s3() as server:
        client = server.client()
        for bucket in ("data", "data2"):
            client.create_bucket(Bucket=bucket)
        for key in ("set/shards/a.jpg", "set/100%25 caf\u00e9 ?#.jpg", "set/%2e%2e/b.jpg", "set2/a.jpg"):
            client.put_object(Bucket="data", Key=key, Body=JPEG)
        client.put_object(Bucket="data2", Key="set/a.jpg", Body=JPEG)
        yield server


def loader(client: Any, **options: Any) -> MediaLoader:
    return MediaLoader(source_uri="s3://data/set/", s3_client=lambda: client, **options)


def failure(loader: MediaLoader, ref: str) -> SampleError:
    with pytest.raises(SampleError) as caught:
        loader.load(MediaRef("image", ref), shard="shards/1.jsonl")
    assert caught.value.media == ref
    return caught.value


@pytest.mark.parametrize(
    "ref",
    ["a.jpg", "s3://data/set/shards/a.jpg", "../100%25 caf\u00e9 ?#.jpg", "s3://data/set/%2e%2e/b.jpg"],
)
def test_objects_below_the_shards_prefix(s3: S3Server, ref: str) -> None:
    media = loader(s3.client()).load(MediaRef("image", ref), shard="shards/1.jsonl")
    assert media.data == JPEG


@pytest.mark.parametrize("ref", ["s3://data2/set/a.jpg", "s3://data/set2/a.jpg", "../../set2/a.jpg"])
def test_objects_elsewhere_are_not_asked_for(ref: str) -> None:
    with raw_server(answer(JPEG)) as server:
        client = S3Server(server.url().rstrip("/")).client()
        assert failure(loader(client), ref).kind == "media_refused"
        assert server.connections == 0


def test_another_bucket_in_the_roots(s3: S3Server) -> None:
    roots = ["s3://data/set/", "s3://data2/"]
    media = loader(s3.client(), roots=roots).load(MediaRef("image", "s3://data2/set/a.jpg"))
    assert media.data == JPEG


def test_an_object_that_is_not_there_is_missing(s3: S3Server) -> None:
    assert failure(loader(s3.client()), "nowhere.jpg").kind == "media_missing"
    assert (
        failure(loader(s3.client(), roots=["s3://nobucket/"]), "s3://nobucket/a.jpg").kind == "media_missing"
    )


def test_an_object_over_the_limit_is_too_large(s3: S3Server) -> None:
    assert failure(loader(s3.client(), max_bytes=len(JPEG) - 1), "a.jpg").kind == "media_too_large"


def test_denied_access_is_unreadable() -> None:
    denied = answer(ERROR.format(code="AccessDenied").encode(), status="403 Forbidden")
    with raw_server(denied) as server:
        client = S3Server(server.url().rstrip("/")).client(retries={"max_attempts": 1})
        assert failure(loader(client), "a.jpg").kind == "media_unreadable"


def test_what_s3_denies_in_one_root_is_looked_for_in_the_next(s3: S3Server, tmp_path: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    denied = answer(ERROR.format(code="AccessDenied").encode(), status="403 Forbidden")
    with raw_server(denied) as server:
        client = S3Server(server.url().rstrip("/")).client(retries={"max_attempts": 1})
        roots = ["s3://data/set/", str(tmp_path)]
        media = loader(client, roots=roots).load(MediaRef("image", "a.jpg"), shard="shards/1.jsonl")
        assert media.data == JPEG


@pytest.mark.parametrize(("status", "code"), [("500 Oops", "InternalError"), ("503 Slow Down", "SlowDown")])
def test_an_s3_that_fails_is_not_the_samples_fault(status: str, code: str) -> None:
    with raw_server(answer(ERROR.format(code=code).encode(), status=status)) as server:
        client = S3Server(server.url().rstrip("/")).client(retries={"max_attempts": 1})
        assert isinstance(failure(loader(client), "a.jpg"), TransientError)


def test_of_several_places_the_message_names_the_one_that_denied_access() -> None:
    denied = answer(ERROR.format(code="AccessDenied").encode(), status="403 Forbidden")
    with raw_server(denied) as server:
        client = S3Server(server.url().rstrip("/")).client(retries={"max_attempts": 1})
        error = failure(loader(client, roots=["s3://data/set/", "/nowhere"]), "a.jpg")
    assert error.kind == "media_unreadable"
    assert "AccessDenied" in error.message


def test_an_s3_that_is_down_is_not_the_samples_fault() -> None:
    with raw_server(b"") as server:
        url = server.url().rstrip("/")
    client = S3Server(url).client(retries={"max_attempts": 1}, connect_timeout=1)
    assert isinstance(failure(loader(client), "a.jpg"), TransientError)


def test_a_connection_that_breaks_within_a_picture_is_taken_up_again(s3: S3Server) -> None:
    with faulty_proxy(s3.endpoint_url, [Fault("reset", after_bytes=1000)]) as proxy:
        client = s3.client(endpoint_url=proxy.endpoint_url)
        media = loader(client).load(MediaRef("image", "a.jpg"), shard="shards/1.jsonl")
        assert media.data == JPEG
        assert len(proxy.faults) == 1
