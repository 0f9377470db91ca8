"""Media over HTTP from a server that says anything: what is taken, given up, tried again and refused."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tenacity

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.http_media import ATTEMPTS, LONGEST_WAIT_S, HttpFetcher
from airflow_vlm_provider.shards.http_urls import parse_url
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.shards.media_roots import MediaRoots
from airflow_vlm_provider.types import MediaRef
from tests.support.http_fetches import JPEG, MAX_BYTES, failure, fetch
from tests.support.media import load_media
from tests.support.raw_http import answer, drip, flood, hang, raw_server, reset

# A fetch that never gives up must not hold the whole run up.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


def test_a_picture_below_the_root_is_fetched() -> None:
    with raw_server(answer(JPEG)) as server:
        assert fetch(server.url("/pics/a.jpg?w=8"), server.url("/pics/")) == JPEG
        (request,) = server.requests
    lines = request.decode().split("\r\n")
    assert lines[0] == "GET /pics/a.jpg?w=8 HTTP/1.1"
    names = {line.partition(":")[0].lower() for line in lines[1:] if line}
    assert names == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert f"Host: 127.0.0.1:{server.port}" in lines


def test_the_loader_fetches_and_checks() -> None:
    with raw_server(
        answer(JPEG), answer(b"<html>oops</html>"), answer(b"", status="404 Not Found")
    ) as server:
        loader = MediaLoader(source_uri="s3://bucket/", roots=[server.url("/pics/")])
        url = server.url("/pics/a.jpg")
        assert load_media(loader, MediaRef("image", url)).data == JPEG
        for kind in ("media_corrupt", "media_missing"):
            with pytest.raises(SampleError) as caught:
                load_media(loader, MediaRef("image", url))
            assert caught.value.kind == kind
            assert caught.value.media == url


def test_a_relative_reference_is_looked_for_below_an_http_root(tmp_path: Path) -> None:
    with raw_server(answer(JPEG)) as server:
        loader = MediaLoader(
            source_uri=f"file://{tmp_path}/", roots=[f"file://{tmp_path}", server.url("/pics/")]
        )
        assert load_media(loader, MediaRef("image", "x/a.jpg"), shard="shards/1.jsonl").data == JPEG
        assert server.requests[0].startswith(b"GET /pics/x/a.jpg ")


def test_many_threads_share_a_fetcher() -> None:
    with raw_server(answer(JPEG)) as server:
        fetcher = HttpFetcher(reach=MediaRoots([server.url()]).reach, max_bytes=MAX_BYTES)
        url = parse_url(server.url("/a.jpg"))
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda _: fetcher.fetch(url), range(100))) == [JPEG] * 100


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
    ],
)
def test_a_dripping_body_or_header_is_given_up(start: bytes) -> None:
    with raw_server(drip(start, b"x")) as server:
        error = failure(server.url("/a.jpg"), server.url(), total_timeout=0.5)
        assert isinstance(error, TransientError)


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123"])
def test_silence_is_given_up(start: bytes) -> None:
    with raw_server(hang(start)) as server:
        error = failure(server.url("/a.jpg"), server.url(), read_timeout=0.2, total_timeout=1000.0)
        assert isinstance(error, TransientError)
        assert server.connections == ATTEMPTS


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65536),
    ],
)
def test_an_endless_body_is_too_large(start: bytes, piece: bytes) -> None:
    with raw_server(flood(start, piece)) as server:
        error = failure(server.url("/a.jpg"), server.url(), total_timeout=30.0, read_timeout=30.0)
        assert error.kind == "media_too_large"
        assert server.connections == 1


def test_a_body_that_is_declared_too_large_is_not_waited_for() -> None:
    with raw_server(hang(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")) as server:
        assert failure(server.url("/a.jpg"), server.url()).kind == "media_too_large"


def test_endless_headers_are_given_up() -> None:
    with raw_server(flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000)) as server:
        assert isinstance(failure(server.url("/a.jpg"), server.url()), TransientError)


def test_the_limit_itself_is_allowed() -> None:
    with raw_server(answer(b"x" * 1000)) as server:
        assert len(fetch(server.url("/a.jpg"), server.url(), max_bytes=1000)) == 1000
        assert failure(server.url("/a.jpg"), server.url(), max_bytes=999).kind == "media_too_large"


def test_a_body_shorter_than_declared_is_not_taken() -> None:
    with raw_server(answer(JPEG, length=len(JPEG) + 1)) as server:
        error = failure(server.url("/a.jpg"), server.url())
        assert isinstance(error, TransientError)
        assert server.connections == ATTEMPTS


def test_a_body_longer_than_declared_ends_where_it_was_declared_to() -> None:
    with raw_server(answer(JPEG + b"more", length=len(JPEG))) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG


def test_a_server_that_keeps_the_connection_open_is_not_waited_for() -> None:
    with raw_server(hang(answer(JPEG))) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
        assert server.connections == 1


def test_chunks_and_bodies_without_a_length() -> None:
    half = len(JPEG) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (JPEG[:half], JPEG[half:]))
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    with raw_server(chunked + b"0\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n" + JPEG, chunked) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
        assert isinstance(failure(server.url("/a.jpg"), server.url()), TransientError)


# ---------------------------------------------------------------- what servers say


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("404 Not Found", "media_missing"),
        ("410 Gone", "media_missing"),
        ("401 Unauthorized", "media_unreadable"),
        ("403 Forbidden", "media_unreadable"),
        ("204 No Content", "media_unreadable"),
        ("206 Partial Content", "media_unreadable"),
        ("304 Not Modified", "media_unreadable"),
        ("400 Bad Request", "media_unreadable"),
        ("418 Teapot", "media_unreadable"),
    ],
)
def test_other_answers_are_the_samples_own_failures(status: str, kind: str) -> None:
    with raw_server(answer(b"", status=status)) as server:
        error = failure(server.url("/a.jpg?signature=hush"), server.url())
        assert error.kind == kind
        assert status[:3] in error.message
        assert "hush" not in error.message
        assert server.connections == 1


@pytest.mark.parametrize(
    "status", ["500 Oops", "502 Bad Gateway", "503 Unavailable", "429 Too Many", "408 Late"]
)
def test_transient_answers_are_tried_again(status: str) -> None:
    failed = answer(b"", status=status)
    with raw_server(failed, answer(JPEG)) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
    with raw_server(failed) as server:
        assert isinstance(failure(server.url("/a.jpg"), server.url()), TransientError)
        assert server.connections == ATTEMPTS


@pytest.mark.parametrize(
    "broken", [reset(), reset(b"HTTP/1.1 200"), reset(answer(JPEG)[:500]), b"", b"not HTTP at all\r\n\r\n"]
)
def test_broken_connections_are_tried_again(broken: Any) -> None:
    with raw_server(broken, answer(JPEG)) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
        assert server.connections == 2


def test_a_server_that_is_down_is_not_the_samples_fault() -> None:
    with raw_server(b"") as server:
        url, root = server.url("/a.jpg"), server.url()
    assert isinstance(failure(url, root), TransientError)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("99999", LONGEST_WAIT_S), ("soon", 0.0), ("", 0.0)]
)
def test_retry_after_is_honoured_within_reason(
    header: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", waits.append)
    busy = answer(b"", status="503 Busy", headers=f"Retry-After: {header}\r\n")
    with raw_server(busy, answer(JPEG)) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
    assert len([wait for wait in waits if seconds <= wait <= seconds + 1]) >= 1


# ---------------------------------------------------------------- TLS


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """Make a server's context with a certificate of its own making, and the file that a client may trust."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    alternative: x509.GeneralName = x509.DNSName(name)
    if name[0].isdigit():
        alternative = x509.IPAddress(ipaddress.ip_address(name))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    trusted, private = folder / f"{name}.pem", folder / f"{name}.key"
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, private)
    return context, trusted


def test_https_with_a_certificate_that_the_machine_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = certificate(tmp_path, "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with raw_server(answer(JPEG), tls=context) as server:
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG


def test_https_with_any_other_certificate_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, _ = certificate(tmp_path, "127.0.0.1")
    with raw_server(answer(JPEG), tls=context) as server:
        error = failure(server.url("/a.jpg"), server.url())
        assert error.kind == "media_unreadable"
        assert "certificate" in error.message
        assert server.requests == []
    context, trusted = certificate(tmp_path, "other.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with raw_server(answer(JPEG), tls=context) as server:
        assert failure(server.url("/a.jpg"), server.url()).kind == "media_unreadable"
        assert server.requests == []
