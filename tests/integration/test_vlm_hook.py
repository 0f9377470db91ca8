"""The connection test against real servers: each thing that can be wrong gets its own sentence."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from airflow_vlm_provider.hooks.vlm import VLMHook
from tests.support.stub_endpoint import StubServer, start_stub

pytestmark = pytest.mark.integration

KEY = "sk-integration-test-0001"
MODELS = [f"model-{number:02}" for number in range(12)]

Test = Callable[..., tuple[bool, str]]


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    with start_stub(api_key=KEY, models=MODELS) as server:
        yield server


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VLMHook]:
    def make(**fields: Any) -> VLMHook:
        monkeypatch.setenv("AIRFLOW_CONN_VLM_TEST", json.dumps({"conn_type": "vlm", **fields}))
        return VLMHook("vlm_test")

    return make


@contextlib.contextmanager
def serving(body: bytes, content_type: str) -> Iterator[str]:
    """An HTTP server that answers everything with the same body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def test_a_served_model_is_confirmed(hook, stub):
    assert hook(host=stub.base_url, password=KEY, extra={"model": "model-03"}).test_connection() == (
        True,
        f"Connection 'vlm_test': {stub.base_url} serves 'model-03'.",
    )


def test_without_a_model_the_served_ones_are_listed(hook, stub):
    well, message = hook(host=stub.base_url, password=KEY).test_connection()

    assert well
    assert "serves 'model-00', 'model-01', " in message
    assert "'model-09' and 2 more" in message
    assert "model-10" not in message


def test_an_unknown_model_is_told_the_served_ones(hook, stub):
    well, message = hook(host=stub.base_url, password=KEY, extra={"model": "gpt-x"}).test_connection()

    assert not well
    assert message.startswith(f"Connection 'vlm_test': {stub.base_url} does not serve the model 'gpt-x' but ")
    assert "'model-00'" in message


def test_a_refused_key_is_told_apart_and_not_repeated(hook, stub):
    wrong = "sk-wrong-key-0002"
    well, message = hook(host=stub.base_url, password=wrong).test_connection()

    assert not well
    assert message.startswith(f"Connection 'vlm_test': {stub.base_url} refuses the API key (HTTP 401).")
    assert wrong not in message


def test_a_key_in_a_header_takes_the_place_of_the_password(hook, stub):
    extra = {"model": "model-00", "headers": {"authorization": f"Bearer {KEY}"}}

    assert hook(host=stub.base_url, extra=extra).test_connection()[0]
    assert hook(host=stub.base_url, password="sk-wrong-key-0002", extra=extra).test_connection()[0]


def test_an_unreachable_host_is_told_apart(hook):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        # Bound but not listening: whoever connects is refused.
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"

        well, message = hook(host=url, password=KEY).test_connection()

    assert not well
    assert message.startswith(f"Connection 'vlm_test': {url} cannot be reached (")
    assert "refused" in message


def test_a_host_that_says_nothing_is_told_apart(hook):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"

        well, message = hook(host=url, extra={"timeout": 0.2}).test_connection()

    assert not well
    assert message.startswith(f"Connection 'vlm_test': {url} did not answer within 0.2 s.")


def test_a_base_url_without_its_path_is_told_apart(hook, stub):
    url = stub.base_url.removesuffix("/v1")

    well, message = hook(host=url, password=KEY).test_connection()

    assert not well
    assert f"{url}/models answered HTTP 404. Check the base URL" in message


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<html>Welcome</html>", "text/html"),
        (b'{"detail": "ok"}', "application/json"),
        (b'["model"]', "application/json"),
        (b"{truncated", "application/json"),
    ],
)
def test_a_server_of_another_kind_is_told_apart(hook, body, content_type):
    with serving(body, content_type) as url:
        well, message = hook(host=url).test_connection()

    assert not well
    assert f"{url}/models did not answer with a list of models" in message
