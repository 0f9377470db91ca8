"""Where media over HTTP may be fetched from: addresses and redirects never lead out of the roots."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from airflow_vlm_provider.errors import TransientError
from airflow_vlm_provider.shards.http_media import MAX_REDIRECTS
from tests.support.http_fetches import JPEG, failure, fetch
from tests.support.raw_http import RawServer, answer, raw_server, redirect

# A fetch that never gives up must not hold the whole run up.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


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
