from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tenacity

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.http_media import ATTEMPTS, LONGEST_WAIT_S, MAX_REDIRECTS, HttpFetcher
from airflow_vlm_provider.shards.http_urls import parse_url
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.shards.media_roots import MediaRoots
from airflow_vlm_provider.types import MediaRef
from tests.support.images import encode, photo
from tests.support.media import load_media
from tests.support.raw_http import RawServer, answer, drip, flood, hang, raw_server, redirect, reset

# A fetch that never gives up must not hold the whole run up.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

JPEG = encode(photo(), "JPEG")
MAX_BYTES = 1024 * 1024


def fetch(url: str, *roots: str, **limits: Any) -> bytes:
    """Fetch with patience for a fraction of a second."""
    allowed = MediaRoots(roots)
    limits = {
        "max_bytes": MAX_BYTES,
        "read_timeout": 1.0,
        "connect_timeout": 1.0,
        "total_timeout": 2.0,
        "first_wait": 0.001,
        **limits,
    }
    return HttpFetcher(reach=allowed.reach, **limits).fetch(parse_url(url))


def failure(url: str, *roots: str, **limits: Any) -> SampleError:
    with pytest.raises(SampleError) as caught:
        fetch(url, *roots, **limits)
    return caught.value


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


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::]",
    ],
)
def test_an_open_root_does_not_open_this_machine(host: str) -> None:
    with raw_server(answer(JPEG)) as server:
        error = failure(server.url("/a.jpg", host), "http://", "https://")
        assert error.kind == "media_refused"
        assert server.connections == 0


def test_a_root_that_spells_loopback_opens_its_port_only() -> None:
    with raw_server(answer(JPEG)) as allowed, raw_server(answer(JPEG)) as other:
        roots = ("http://", allowed.url("/pics/"))
        assert fetch(allowed.url("/pics/a.jpg"), *roots) == JPEG
        assert failure(other.url("/pics/a.jpg"), *roots).kind == "media_refused"
        assert failure(allowed.url("/a.jpg"), *roots).kind == "media_refused"
        assert other.connections == 0
        assert allowed.connections == 1


Resolver = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make every name resolve to the next of some addresses, the last one for ever; return the names asked for."""

    def install(*addresses: str) -> list[str]:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, *rest: object, **more: object) -> list[tuple[Any, ...]]:
            address = addresses[min(len(asked), len(addresses) - 1)]
            asked.append(host)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            place = (address, port, 0, 0) if ":" in address else (address, port)
            return [(family, socket.SOCK_STREAM, 6, "", place)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return asked

    return install


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_name_that_leads_inside_is_refused_before_anything_is_sent(
    resolves: Callable[..., list[str]], address: str, scheme: str
) -> None:
    resolves(address)
    with raw_server(answer(JPEG)) as server:
        error = failure(f"{scheme}://evil.example:{server.port}/a.jpg", "http://", "https://")
        assert error.kind == "media_refused"
        assert server.connections == 0


def test_a_name_in_the_roots_does_not_open_this_machine(resolves: Callable[..., list[str]]) -> None:
    resolves("127.0.0.1")
    with raw_server(answer(JPEG)) as server:
        root = f"http://pics.example:{server.port}/"
        error = failure(root + "a.jpg", root)
        assert error.kind == "media_refused"
        assert "loopback" in error.message
        assert server.connections == 0


def test_link_local_is_refused_even_to_a_name_in_the_roots(resolves: Callable[..., list[str]]) -> None:
    resolves("169.254.169.254")
    error = failure("http://pics.example/a.jpg", "http://pics.example/")
    assert error.kind == "media_refused"
    assert "link-local" in error.message


def test_a_name_that_changes_its_address_gains_nothing(
    resolves: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[str] = []

    class Watched(socket.socket):
        def connect(self, address: Any) -> None:
            connected.append(address[0])
            raise ConnectionRefusedError

    monkeypatch.setattr(socket, "socket", Watched)
    asked = resolves("93.184.216.34", "127.0.0.1")
    error = failure("http://rebinds.example/a.jpg", "http://")
    # The first connection went where the check had looked; the second look-up was checked like the first.
    assert connected == ["93.184.216.34"]
    assert asked == ["rebinds.example"] * 2
    assert error.kind == "media_refused"


def test_a_host_that_does_not_exist_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*rest: object, **more: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert failure("https://nowhere.example/a.jpg", "https://").kind == "media_missing"


def test_a_resolver_that_is_down_is_not_the_samples_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*rest: object, **more: object) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert isinstance(failure("https://pics.example/a.jpg", "https://"), TransientError)


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(answer(JPEG)) as server, raw_server(answer(b"from the proxy")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url())
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert fetch(server.url("/a.jpg"), server.url()) == JPEG
        assert proxy.connections == 0


# ---------------------------------------------------------------- redirects


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
@pytest.mark.parametrize("location", ["/pics/b.jpg", "b.jpg", "{root}b.jpg"])
def test_a_redirect_below_the_root_is_followed(status: str, location: str) -> None:
    with raw_server(answer(JPEG)) as server:
        root = server.url("/pics/")
        server.plan.insert(0, lambda sock: sock.sendall(redirect(location.format(root=root), status)))
        assert fetch(root + "a.jpg", root) == JPEG
        assert server.requests[1].startswith(b"GET /pics/b.jpg ")


@pytest.mark.parametrize(
    "location",
    [
        "/private/b.jpg",
        "../private/b.jpg",
        "%2e%2e/private/b.jpg",
        "http://127.0.0.1:{other}/pics/b.jpg",
        "//127.0.0.1:{other}/pics/b.jpg",
        "http://localhost:{other}/pics/b.jpg",
        "https://127.0.0.1:{port}/pics/b.jpg",
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://me:hush@127.0.0.1:{port}/pics/b.jpg",
        "http://127.0.0.1:{port}\\@evil.example/pics/b.jpg",
        "/pics/x\\y.jpg",
        "file:///etc/passwd",
        "ftp://127.0.0.1/b.jpg",
        "http://[",
        "javascript:alert(1)",
    ],
)
@pytest.mark.parametrize("open_roots", [(), ("http://", "https://")])
def test_a_redirect_out_of_the_roots_is_refused(location: str, open_roots: tuple[str, ...]) -> None:
    with raw_server(answer(b"secret")) as other, raw_server(answer(b"secret")) as server:
        target = location.format(port=server.port, other=other.port)
        server.plan.insert(0, lambda sock: sock.sendall(redirect(target)))
        error = failure(server.url("/pics/a.jpg"), server.url("/pics/"), *open_roots)
        assert error.kind == "media_refused"
        assert "hush" not in error.message
        assert other.connections == 0
        assert server.connections == 1


def test_redirects_are_followed_so_often_and_no_more() -> None:
    def chain(length: int, server: RawServer) -> list[Any]:
        step = redirect("/pics/next.jpg")
        return [*([lambda sock: sock.sendall(step)] * length), lambda sock: sock.sendall(answer(JPEG))]

    with raw_server(b"") as server:
        server.plan[:] = chain(MAX_REDIRECTS, server)
        assert fetch(server.url("/pics/a.jpg"), server.url("/pics/")) == JPEG
    with raw_server(b"") as server:
        server.plan[:] = chain(MAX_REDIRECTS + 1, server)
        error = failure(server.url("/pics/a.jpg"), server.url("/pics/"))
        assert error.kind == "media_unreadable"
        assert server.connections == MAX_REDIRECTS + 1


def test_a_redirect_to_nowhere_is_unreadable() -> None:
    with raw_server(answer(b"", status="302 Found")) as server:
        assert failure(server.url("/a.jpg"), server.url()).kind == "media_unreadable"


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
