from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse, HeadersDict

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.ledger.media_memory import MediaMemory, MediaRecorder
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import MediaRef
from demo.s3_server import S3Server, start_s3
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.images import encode, photo
from tests.support.media import load_media
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


class RawBody(io.BytesIO):
    """As much of a raw HTTP response as botocore reads."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


def loader(client: Any, **options: Any) -> MediaLoader:
    return MediaLoader(source_uri="s3://data/set/", s3_client=lambda: client, **options)


def failure(loader: MediaLoader, ref: str) -> SampleError:
    with pytest.raises(SampleError) as caught:
        load_media(loader, MediaRef("image", ref), shard="shards/1.jsonl")
    assert caught.value.media == ref
    return caught.value


@pytest.mark.parametrize(
    "ref",
    ["a.jpg", "s3://data/set/shards/a.jpg", "../100%25 caf\u00e9 ?#.jpg", "s3://data/set/%2e%2e/b.jpg"],
)
def test_objects_below_the_shards_prefix(s3: S3Server, ref: str) -> None:
    media = load_media(loader(s3.client()), MediaRef("image", ref), shard="shards/1.jsonl")
    assert media.data == JPEG


@pytest.mark.parametrize("ref", ["s3://data2/set/a.jpg", "s3://data/set2/a.jpg", "../../set2/a.jpg"])
def test_objects_elsewhere_are_not_asked_for(ref: str) -> None:
    with raw_server(answer(JPEG)) as server:
        client = S3Server(server.url().rstrip("/")).client()
        assert failure(loader(client), ref).kind == "media_refused"
        assert server.connections == 0


def test_another_bucket_in_the_roots(s3: S3Server) -> None:
    roots = ["s3://data/set/", "s3://data2/"]
    media = load_media(loader(s3.client(), roots=roots), MediaRef("image", "s3://data2/set/a.jpg"))
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
        media = load_media(loader(client, roots=roots), MediaRef("image", "a.jpg"), shard="shards/1.jsonl")
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
        media = load_media(loader(client), MediaRef("image", "a.jpg"), shard="shards/1.jsonl")
        assert media.data == JPEG
        assert len(proxy.faults) == 1


@contextmanager
def counted(client: Any) -> Iterator[Counter[str]]:
    """Count the requests that a client sends, by operation."""
    sent: Counter[str] = Counter()

    def count(model: Any, **_: Any) -> None:
        sent[model.name] += 1

    client.meta.events.register("before-call.s3", count)
    try:
        yield sent
    finally:
        client.meta.events.unregister("before-call.s3", count)


@pytest.fixture(scope="module")
def many(s3: S3Server) -> list[str]:
    """2,500 pictures in one folder: three pages of a listing."""
    names = [f"{number:05}.jpg" for number in range(2500)]
    client = s3.client()
    client.create_bucket(Bucket="many")
    with ThreadPoolExecutor(8) as threads:
        put = threads.map(
            lambda name: client.put_object(Bucket="many", Key=f"set/pics/{name}", Body=name.encode()), names
        )
        assert len(list(put)) == 2500
    return names


def remembered(s3: S3Server, loader: MediaLoader, refs: list[str], files: LocalStore) -> None:
    """Fetch pictures and save the record of them."""
    recorder = MediaRecorder(loader.memory_parameters())
    with ThreadPoolExecutor(8) as threads:
        for source in threads.map(
            lambda ref: loader.fetch(MediaRef("image", ref), shard="pics/1.jsonl"), refs
        ):
            recorder.add(source.ref, source.looked, digest=source.digest)
    assert recorder.count == len(refs)
    recorder.save(files, "1.jsonl", "tag")
    recorder.close()


def test_a_replaced_picture_is_noticed_by_listing(s3: S3Server, many: list[str], tmp_path: Path) -> None:
    files, client = LocalStore(root=str(tmp_path)), s3.client()
    media = MediaLoader(source_uri="s3://many/set/", s3_client=lambda: client)
    remembered(s3, media, many, files)

    def read() -> MediaMemory:
        return MediaMemory.read(files, "_vlm/1.jsonl/tag/media.jsonl.zst", media.memory_parameters())

    with counted(client) as sent:
        memory = read()
        assert memory.verify(media.identities) == 0
    assert dict(sent) == {"ListObjectsV2": 3}
    recalled = memory.recall("01234.jpg")
    assert recalled is not None
    assert recalled.digest == hashlib.sha256(b"01234.jpg").hexdigest()

    client.put_object(Bucket="many", Key="set/pics/01234.jpg", Body=b"12340.jpg")
    client.delete_object(Bucket="many", Key="set/pics/02000.jpg")
    with counted(client) as sent:
        memory = read()
        assert memory.verify(media.identities) == 2
    assert dict(sent) == {"ListObjectsV2": 3}
    assert [ref for ref in many if memory.recall(ref) is None] == ["01234.jpg", "02000.jpg"]


def test_what_was_looked_at_in_s3_is_told_again(s3: S3Server) -> None:
    client = s3.client()
    client.put_object(Bucket="data2", Key="set/shards/only here.jpg", Body=JPEG)
    media = loader(client, roots=["s3://data/set/", "s3://data2/set/", "s3://nobucket/"], max_bytes=len(JPEG))
    client.put_object(Bucket="data", Key="set/shards/large.jpg", Body=JPEG + b"x")
    for ref in ("a.jpg", "only here.jpg", "nowhere.jpg", "large.jpg", "s3://nobucket/a.jpg"):
        try:
            looked = media.fetch(MediaRef("image", ref), shard="shards/1.jsonl").looked
        except SampleError as error:
            looked = error.looked
        assert looked
        now = dict(media.identities(sorted(uri for uri, _ in looked)))
        assert tuple((uri, now[uri]) for uri, _ in looked) == looked
    assert [uri for uri, identity in looked if identity is None] == ["s3://nobucket/a.jpg"]


def test_where_s3_denies_listing_files_are_looked_up_one_by_one(s3: S3Server) -> None:
    client = s3.client()

    def deny(**_: Any) -> Any:
        body = ERROR.format(code="AccessDenied").encode()
        return AWSResponse("http://s3/", 403, HeadersDict(), RawBody(body))

    media = loader(client)
    uris = ["s3://data/set/nowhere.jpg", "s3://data/set/shards/a.jpg"]
    expected = list(media.identities(uris))
    assert [identity is None for _, identity in expected] == [True, False]
    client.meta.events.register("before-send.s3.ListObjectsV2", deny)
    with counted(client) as sent:
        assert list(media.identities(uris)) == expected
    assert sent["HeadObject"] == 2


def test_an_s3_that_is_down_is_not_taken_for_changed_pictures() -> None:
    with raw_server(b"") as server:
        url = server.url().rstrip("/")
    client = S3Server(url).client(retries={"max_attempts": 1}, connect_timeout=1)
    with pytest.raises(ConnectionError):
        list(loader(client).identities(["s3://data/set/a.jpg"]))
