"""Videos over networks: streamed to a file, resumed where they break, refused where they are too large."""

from __future__ import annotations

import hashlib
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.http_media import HttpFetcher
from airflow_vlm_provider.shards.http_urls import parse_url
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.shards.media_roots import MediaRoots
from airflow_vlm_provider.shards.video_files import Spool, SpoolError, VideoFile
from airflow_vlm_provider.types import FrameSampling, MediaRef, SourceMedia
from demo.s3_server import S3Server, start_s3
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.raw_http import answer, drip, flood, raw_server, redirect
from tests.support.videos import numbers, video

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

CLIP = video(100, size=(320, 320), noisy=True)
DIGEST = hashlib.sha256(CLIP).hexdigest()
HALF = len(CLIP) // 2
LARGE = 64 * 1024 * 1024
ONE_A_SECOND = FrameSampling(fps=1, max_frames=99)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with start_s3() as server:
        client = server.client()
        client.create_bucket(Bucket="data")
        client.put_object(Bucket="data", Key="set/shards/a.mp4", Body=CLIP)
        client.put_object(Bucket="data", Key="set/shards/large.bin", Body=bytes(LARGE))
        yield server


def over_s3(client: Any, **options: Any) -> MediaLoader:
    return MediaLoader(source_uri="s3://data/set/", s3_client=lambda: client, **options)


def fetch(loader: MediaLoader, ref: str = "a.mp4") -> SourceMedia:
    return loader.fetch(MediaRef("video", ref), shard="shards/1.jsonl")


def failure(loader: MediaLoader, ref: str = "a.mp4") -> SampleError:
    with pytest.raises(SampleError) as caught:
        fetch(loader, ref)
    assert caught.value.media == ref
    return caught.value


def content(source: SourceMedia) -> bytes:
    file: VideoFile = source.file
    return file.reader().readall()


# ---------------------------------------------------------------- S3


def test_a_video_in_s3(s3: S3Server) -> None:
    loader = over_s3(s3.client())
    source = fetch(loader)
    assert (source.digest, source.data, content(source)) == (DIGEST, b"", CLIP)
    assert os.fstat(source.file.fileno()).st_nlink == 0
    (looked,) = source.looked
    assert dict(loader.identities([looked[0]])) == dict([looked])
    assert loader.probe(source)["duration"] == pytest.approx(10)
    assert numbers(loader.prepare(source, frames=ONE_A_SECOND)) == [5 + 10 * k for k in range(10)]
    assert numbers(loader.prepare(source, frames=ONE_A_SECOND, as_video=True)) == [
        5 + 10 * k for k in range(10)
    ]


def test_a_large_video_is_never_in_memory(s3: S3Server) -> None:
    loader = over_s3(s3.client())
    fetch(loader)  # what is imported and opened once does not count
    tracemalloc.start()
    try:
        source = fetch(loader, "large.bin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source.file.size == LARGE
    assert source.digest == hashlib.sha256(bytes(LARGE)).hexdigest()
    assert peak < LARGE / 8


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_a_connection_that_breaks_is_taken_up_again(s3: S3Server, kind: Any) -> None:
    plan = [Fault(kind, after_bytes=HALF), Fault(kind, after_bytes=HALF // 4), None]
    with faulty_proxy(s3.endpoint_url, plan) as proxy:
        source = fetch(over_s3(s3.client(endpoint_url=proxy.endpoint_url)))
        assert (source.digest, content(source)) == (DIGEST, CLIP)
        assert len(proxy.faults) == 2
        # From where it broke, not from the beginning.
        assert b"range: bytes=" in proxy.requests[1].lower()


def test_an_object_that_is_replaced_meanwhile_is_not_mixed(s3: S3Server) -> None:
    client = s3.client()
    client.put_object(Bucket="data", Key="set/shards/changing.mp4", Body=CLIP)
    replaced = False

    def replace(**_: Any) -> None:
        nonlocal replaced
        if not replaced:
            replaced = True
            s3.client().put_object(Bucket="data", Key="set/shards/changing.mp4", Body=CLIP[::-1])

    with faulty_proxy(s3.endpoint_url, [Fault("reset", after_bytes=HALF)]) as proxy:
        broken = s3.client(endpoint_url=proxy.endpoint_url)
        # Between the answer's first half and the request for its second.
        broken.meta.events.register(
            "before-send.s3.GetObject", lambda **_: replace() if proxy.faults else None
        )
        assert isinstance(failure(over_s3(broken), "changing.mp4"), TransientError)
    assert replaced
    assert fetch(over_s3(client), "changing.mp4").digest == hashlib.sha256(CLIP[::-1]).hexdigest()


def test_an_object_over_the_limit_is_not_transferred(s3: S3Server) -> None:
    with faulty_proxy(s3.endpoint_url) as proxy:
        loader = over_s3(s3.client(endpoint_url=proxy.endpoint_url), max_video_bytes=LARGE - 1)
        assert failure(loader, "large.bin").kind == "media_too_large"
    assert failure(over_s3(s3.client()), "nowhere.mp4").kind == "media_missing"
    assert failure(over_s3(s3.client()), "s3://other/a.mp4").kind == "media_refused"


def test_a_full_disk_is_not_taken_for_a_broken_connection(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
    with pytest.raises(SpoolError, match="No space left on device"):
        fetch(over_s3(s3.client()))


# ---------------------------------------------------------------- http


def over_http(*roots: str, **options: Any) -> MediaLoader:
    return MediaLoader(source_uri="s3://bucket/", roots=roots, **options)


def patient(*roots: str, **limits: Any) -> HttpFetcher:
    """Something that fetches with patience for a fraction of a second."""
    limits = {"read_timeout": 1.0, "total_timeout": 0.5, "first_wait": 0.001, "max_bytes": LARGE, **limits}
    return HttpFetcher(reach=MediaRoots(roots).reach, **limits)


def test_a_video_over_http() -> None:
    with raw_server(answer(CLIP)) as server:
        loader = over_http(server.url())
        source = fetch(loader, server.url("/a.mp4"))
        assert (source.digest, source.data, content(source)) == (DIGEST, b"", CLIP)
        assert source.looked == ((server.url("/a.mp4"), ""),)
        assert numbers(loader.prepare(source, frames=ONE_A_SECOND)) == [5 + 10 * k for k in range(10)]
        assert b"Accept: video/mp4" in server.requests[0]


def test_a_body_that_breaks_off_is_fetched_anew() -> None:
    whole = answer(CLIP)
    with raw_server(whole[:HALF], whole[: HALF // 2], whole) as server:
        source = fetch(over_http(server.url()), server.url("/a.mp4"))
        assert (source.digest, content(source)) == (DIGEST, CLIP)
        assert server.connections == 3
    with raw_server(whole[:HALF]) as server:
        assert isinstance(failure(over_http(server.url()), server.url("/a.mp4")), TransientError)


@pytest.mark.parametrize("says_length", [True, False])
def test_a_body_over_the_limit(says_length: bool) -> None:
    endless = flood(b"HTTP/1.1 200 OK\r\n\r\n", bytes(65536))
    with raw_server(answer(b"", length=LARGE) if says_length else endless) as server:
        loader = over_http(server.url(), max_video_bytes=10_000_000)
        assert failure(loader, server.url("/a.mp4")).kind == "media_too_large"


def test_refusals_are_those_of_images() -> None:
    with raw_server(redirect("http://169.254.169.254/a.mp4"), answer(b"", status="404 Not Found")) as server:
        loader = over_http(server.url())
        assert failure(loader, server.url("/a.mp4")).kind == "media_refused"
        assert failure(loader, server.url("/a.mp4")).kind == "media_missing"
        assert failure(over_http("https://elsewhere/"), server.url("/a.mp4")).kind == "media_refused"


def test_a_large_body_may_take_longer_than_a_small_one() -> None:
    """What has arrived buys time; what only drips does not."""
    start = f"HTTP/1.1 200 OK\r\nContent-Length: {len(CLIP)}\r\n\r\n".encode()
    parts = [CLIP[k : k + len(CLIP) // 10 + 1] for k in range(0, len(CLIP), len(CLIP) // 10 + 1)]

    def slowly(sock: Any) -> None:
        import time

        sock.sendall(start)
        for part in parts:
            time.sleep(0.1)
            sock.sendall(part)

    with raw_server(slowly) as server:
        url = parse_url(server.url("/a.mp4"))
        generous = patient(server.url(), least_rate=len(CLIP) // 4)
        assert generous.download(url, Spool).file().digest == DIGEST
        with pytest.raises(TransientError):
            patient(server.url()).download(url, Spool)
    with raw_server(drip(start, b"x")) as server, pytest.raises(TransientError, match=r"too long|timed out"):
        patient(server.url(), least_rate=len(CLIP) // 4).download(parse_url(server.url("/a.mp4")), Spool)
