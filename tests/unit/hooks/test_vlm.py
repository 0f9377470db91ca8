"""The hook: clients, and what it tells Airflow to keep out of logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from airflow.sdk._shared.secrets_masker import redact, reset_secrets_masker

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.hooks.vlm import VLMHook

KEY = "sk-the-key-of-the-connection"


@pytest.fixture
def make_hook(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VLMHook]:
    """A hook whose connection has these fields."""

    def make(**fields: Any) -> VLMHook:
        monkeypatch.setenv("AIRFLOW_CONN_VLM_TEST", json.dumps({"conn_type": "vlm", **fields}))
        return VLMHook("vlm_test")

    return make


@pytest.fixture
def _fresh_masker():
    reset_secrets_masker()
    yield
    reset_secrets_masker()


def test_airflow_finds_what_it_looks_for_on_a_hook():
    assert VLMHook.conn_type == "vlm"
    assert VLMHook.conn_name_attr == "vlm_conn_id"
    assert VLMHook().vlm_conn_id == VLMHook.default_conn_name == "vlm_default"


@pytest.mark.parametrize("method", ["get_conn", "get_async_conn"])
def test_clients_take_everything_from_the_connection(make_hook, monkeypatch, method):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-worker")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    hook = make_hook(
        host="gpu-1",
        port=8000,
        schema="http",
        password=KEY,
        extra={"timeout": 7, "headers": {"X-Team": "research"}},
    )

    client = getattr(hook, method)()

    assert str(client.base_url) == "http://gpu-1:8000/v1/"
    assert client.api_key == KEY
    assert client.timeout == 7.0
    assert client.max_retries == 0
    assert client.default_headers["X-Team"] == "research"


def test_without_a_key_the_workers_own_is_not_sent_elsewhere(make_hook, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-worker")

    assert make_hook(host="http://gpu-1:8000/v1").get_conn().api_key == "not-needed"


def test_the_connection_is_looked_up_once(make_hook, monkeypatch):
    hook = make_hook(extra={"model": "first"})
    assert hook.settings.model == "first"

    monkeypatch.delenv("AIRFLOW_CONN_VLM_TEST")

    assert hook.settings.model == "first"


@pytest.mark.parametrize("host", [None, "", "  "])
@pytest.mark.parametrize("ask", [VLMHook.get_conn, VLMHook.get_async_conn])
def test_an_endpoint_without_a_host_is_refused_in_a_sentence(make_hook, host, ask):
    with pytest.raises(ConfigError, match="Connection 'vlm_test' has no host") as raised:
        ask(make_hook(host=host, password=KEY))

    assert "https://api.openai.com/v1" in str(raised.value)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_engine_on_the_worker_needs_no_host(make_hook, engine):
    hook = make_hook(extra={"engine": engine, "model": "org/model"})

    assert hook.settings.engine == engine
    assert hook.settings.base_url is None
    well, message = hook.test_connection()
    assert well
    assert "no endpoint to ask" in message
    assert "'org/model'" in message


def test_the_test_says_when_the_engines_package_is_missing(make_hook, monkeypatch):
    monkeypatch.setattr("airflow_vlm_provider.hooks.vlm.importlib.util.find_spec", lambda name: None)

    _, message = make_hook(extra={"engine": "vllm"}).test_connection()
    _, other = make_hook(extra={"engine": "transformers"}).test_connection()

    # Beside Airflow or in another environment: both are ways to have vLLM.
    assert "workers need 'airflow-provider-vlm[vllm]', or [vlm] vllm_command to name" in message
    assert other.endswith("workers need 'airflow-provider-vlm[transformers]'.")


def test_a_wrong_field_fails_the_test_with_its_sentence(make_hook):
    assert make_hook(extra={"engine": "gpt"}).test_connection() == (
        False,
        "Connection 'vlm_test': extra field engine='gpt' is not known. Use one of openai, vllm, transformers.",
    )


def test_a_missing_host_fails_the_test_with_its_sentence(make_hook):
    well, message = make_hook().test_connection()

    assert not well
    assert "has no host" in message


@pytest.mark.usefixtures("_fresh_masker")
def test_key_and_headers_are_masked_once_the_hook_has_seen_them(make_hook):
    headers = {
        "X-Gateway": "sk-with-an-innocent-name",
        "Authorization": "Bearer sk-the-bearer-token",
    }
    hook = make_hook(host="http://gpu-1/v1", password=KEY, extra={"headers": headers})
    secrets = [KEY, "sk-with-an-innocent-name", "sk-the-bearer-token"]
    assert all(redact(secret) == secret for secret in secrets), "the test would prove nothing"

    client = hook.get_conn()

    for secret in secrets:
        assert secret not in redact(f"{vars(hook)} {client.api_key} {client.default_headers} {secret}")


@pytest.mark.usefixtures("_fresh_masker")
def test_the_key_is_masked_even_when_pasted_with_a_line_end_and_the_rest_is_wrong(make_hook):
    hook = make_hook(password=f"{KEY}\n", extra={"engine": "gpt"})

    with pytest.raises(ConfigError):
        _ = hook.settings

    assert redact(f"key: {KEY}") == "key: ***"


def test_neither_the_hook_nor_its_settings_show_a_secret(make_hook):
    hook = make_hook(host="http://gpu-1/v1", password=KEY, extra={"headers": {"X-Gateway": "sk-header"}})

    shown = f"{hook!r} {hook.settings!r}"

    assert KEY not in shown
    assert "sk-header" not in shown
