from __future__ import annotations

import asyncio

import pytest

from airflow_vlm_provider.engines.client import check_address, check_headers, make_client, own_headers
from airflow_vlm_provider.errors import ConfigError

KEY = "sk-very-secret-0123456789"


def test_the_client_leaves_retries_to_the_engine_and_ignores_the_environments_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = make_client(base_url="http://127.0.0.1:9/v1")
    try:
        assert client.max_retries == 0
        assert KEY not in str(dict(client.auth_headers))
    finally:
        asyncio.run(client.close())


def test_own_headers_are_those_that_were_given():
    client = make_client(base_url="http://127.0.0.1:9/v1", api_key=KEY, headers={"X-Team": "vision"})
    try:
        assert {name: value for name, value in own_headers(client).items() if name != "Authorization"} == {
            "X-Team": "vision"
        }
    finally:
        asyncio.run(client.close())


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "https://api.openai.com/v1", "http://[::1]:8080"]
)
def test_an_address_that_passes_is_the_one_that_is_sent_to(url):
    check_address("vlm", url)
    client = make_client(base_url=url)
    try:
        assert str(client.base_url).rstrip("/") == url
    finally:
        asyncio.run(client.close())


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "api.openai.com/v1", "ftp://host/v1", "http:///v1", "http://host:port/v1"]
)
def test_no_addresses(url):
    with pytest.raises(ConfigError, match=r"connection 'vlm'.*host"):
        check_address("connection 'vlm'", url)


def test_an_address_is_quoted_without_its_password():
    with pytest.raises(ConfigError) as caught:
        check_address("vlm", f"ftp://user:{KEY}@host/v1")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY} x", f"{KEY}é", f"\x00{KEY}"])
def test_keys_that_no_header_can_carry_are_not_quoted(key):
    with pytest.raises(ConfigError, match="password") as caught:
        check_headers("connection 'vlm'", key, {})
    assert KEY not in str(caught.value)


def test_headers_that_cannot_be_sent_are_named_but_not_quoted():
    with pytest.raises(ConfigError, match="X-Auth") as caught:
        check_headers("vlm", "", {"X-Auth": f"{KEY}\r\nX-Evil: 1"})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "headers"), [(KEY, {"X-Team": "computer vision, team 1"}), ("", {}), ("", {"X-Tab": "a\tb"})]
)
def test_keys_and_headers_that_pass_are_sent_as_they_are(key, headers):
    check_headers("vlm", key, headers)
    client = make_client(base_url="http://127.0.0.1:9/v1", api_key=key, headers=headers)
    try:
        assert own_headers(client) == headers
        assert client.auth_headers == {"Authorization": f"Bearer {key or 'EMPTY'}"}
    finally:
        asyncio.run(client.close())
