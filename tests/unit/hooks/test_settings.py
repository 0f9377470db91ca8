"""The fields of a connection: what is accepted, and the sentence about what is not."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.hooks.settings import VLMSettings, parse_settings


def settings_of(**extra: Any) -> VLMSettings:
    return parse_settings("conn", extra=json.dumps(extra))[0]


def headers_of(headers: Any) -> dict[str, str]:
    return parse_settings("conn", extra=json.dumps({"headers": headers}))[1]


def error_of(**extra: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        settings_of(**extra)
    return str(raised.value)


def base_url(**fields: Any) -> str | None:
    return parse_settings("conn", **fields)[0].base_url


def test_an_empty_connection_leaves_everything_to_the_defaults():
    settings = settings_of()

    assert settings == VLMSettings(conn_id="conn")
    assert (settings.engine, settings.timeout) == ("openai", 300.0)


def test_every_field_gets_its_type():
    settings = settings_of(
        engine="vllm",
        model="org/model",
        max_concurrency=16,
        requests_per_minute=500,
        tokens_per_minute=2_000_000,
        timeout=2.5,
        prompt_price_per_million=0.15,
        completion_price_per_million=0.6,
        engine_args={"dtype": "bfloat16"},
    )

    assert settings == VLMSettings(
        conn_id="conn",
        engine="vllm",
        model="org/model",
        max_concurrency=16,
        requests_per_minute=500.0,
        tokens_per_minute=2e6,
        timeout=2.5,
        prices=(0.15, 0.6),
        engine_args={"dtype": "bfloat16"},
    )
    assert type(settings.max_concurrency) is int


def test_strings_as_in_a_uri_connection_are_read_as_what_they_say():
    settings = settings_of(
        max_concurrency="32",
        requests_per_minute="500",
        timeout="2.5",
        prompt_price_per_million="0",
        completion_price_per_million="0.6",
        engine_args='{"max_model_len": 8192}',
    )

    assert settings.max_concurrency == 32
    assert settings.requests_per_minute == 500.0
    assert settings.timeout == 2.5
    assert settings.prices == (0.0, 0.6)
    assert settings.engine_args == {"max_model_len": 8192}
    assert headers_of('{"X-Team": "research"}') == {"X-Team": "research"}


@pytest.mark.parametrize("empty", [None, ""])
def test_a_field_left_empty_is_as_if_it_were_not_there(empty):
    names = ("engine", "model", "max_concurrency", "timeout", "headers", "engine_args")

    assert settings_of(**dict.fromkeys(names, empty)) == settings_of()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", "gpt"),
        ("engine", 7),
        ("model", ["a"]),
        ("max_concurrency", 0),
        ("max_concurrency", -1),
        ("max_concurrency", 1.5),
        ("max_concurrency", "many"),
        ("max_concurrency", True),
        ("requests_per_minute", 0),
        ("tokens_per_minute", "100k"),
        ("timeout", 0),
        ("timeout", "30s"),
        ("timeout", [30]),
        ("timeout", "inf"),
        ("timeout", "nan"),
    ],
)
def test_the_sentence_names_connection_field_value_and_remedy(field, value):
    message = error_of(**{field: value})

    assert message.startswith(f"Connection 'conn': extra field {field}={value!r} ")
    assert message.count(".") >= 2, "what is wrong, then the remedy"


def test_an_unknown_engine_is_told_the_known_ones():
    assert "openai, vllm, transformers" in error_of(engine="gpt")


@pytest.mark.parametrize("given", ["prompt_price_per_million", "completion_price_per_million"])
def test_one_price_without_the_other_would_report_a_wrong_cost(given):
    assert "is given without" in error_of(**{given: 1})


def test_a_negative_price_is_refused():
    assert "prompt_price_per_million=-1" in error_of(
        prompt_price_per_million=-1, completion_price_per_million=1
    )


@pytest.mark.parametrize("extra", ["{not json", "[1]", '"text"'])
def test_an_extra_that_is_no_object_is_refused_without_being_shown(extra):
    with pytest.raises(ConfigError, match=r"Connection 'conn': extra is") as raised:
        parse_settings("conn", extra=extra)

    assert extra not in str(raised.value)
    assert raised.value.__context__ is None or raised.value.__suppress_context__, "a traceback would show it"


def test_a_misspelt_field_is_warned_about_with_the_right_name(caplog):
    with caplog.at_level(logging.WARNING):
        settings_of(max_concurency=4)

    assert "'max_concurency' is not used; did you mean 'max_concurrency'?" in caplog.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"host": "gpu-1"}, "https://gpu-1/v1"),
        ({"host": "gpu-1", "port": 8000}, "https://gpu-1:8000/v1"),
        ({"host": "gpu-1", "port": 8000, "schema": "http"}, "http://gpu-1:8000/v1"),
        ({"host": " gpu-1 ", "schema": "HTTP"}, "http://gpu-1/v1"),
        ({"host": "https://api.openai.com/v1"}, "https://api.openai.com/v1"),
        ({"host": "http://gpu-1:8000/proxy/v1"}, "http://gpu-1:8000/proxy/v1"),
        ({"host": "http://gpu-1:8000"}, "http://gpu-1:8000"),
        ({"host": "http://gpu-1:8000/v1", "port": 8000}, "http://gpu-1:8000/v1"),
        # What Airflow makes of vlm://http://gpu-1:8000/v1
        ({"host": "http://gpu-1", "port": 8000, "schema": "v1"}, "http://gpu-1:8000/v1"),
        ({"host": "https://api.openai.com/v1", "schema": "https"}, "https://api.openai.com/v1"),
        ({}, None),
        ({"host": "  "}, None),
        ({"port": 8000, "schema": "http"}, None),
    ],
)
def test_host_port_and_schema_make_the_base_url(fields, expected):
    assert base_url(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"host": "gpu-1", "schema": "ftp"}, "schema='ftp'"),
        ({"host": "ftp://gpu-1"}, "host is not an HTTP base URL"),
        ({"host": "https://"}, "host is not an HTTP base URL"),
        ({"host": "http://gpu-1:8000/v1", "port": 9000}, "port=9000 contradicts"),
    ],
)
def test_a_host_that_cannot_be_asked_is_refused(fields, what):
    with pytest.raises(ConfigError, match="Connection 'conn': ") as raised:
        base_url(**fields)

    assert what in str(raised.value)


def test_a_key_in_the_host_is_refused_because_the_host_is_shown_in_clear():
    with pytest.raises(ConfigError, match="shown in clear") as raised:
        base_url(host="https://user:sk-in-the-host@gpu-1/v1")

    assert "sk-in-the-host" not in str(raised.value)


def test_an_authorization_header_replaces_the_clients_own_whatever_its_spelling():
    assert headers_of({"authorization": " Bearer abc "}) == {"Authorization": "Bearer abc"}


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Key": 12345678},
        {"X-Key": "sk-secret\r\nX-Injected: 1"},
        {"X-Key": "sk-secret-ü"},
        {"X Key": "sk-secret"},
        ["sk-secret"],
        "sk-secret",
        '{"X-Key": "sk-secret"',
    ],
)
def test_a_header_that_cannot_be_sent_is_refused_without_showing_its_value(headers):
    with pytest.raises(ConfigError, match="Connection 'conn': extra field headers") as raised:
        headers_of(headers)

    assert "sk-secret" not in str(raised.value)
    assert "12345678" not in str(raised.value)


def test_settings_hold_no_header():
    settings, headers = parse_settings("conn", extra=json.dumps({"headers": {"X-Key": "sk-secret"}}))

    assert headers == {"X-Key": "sk-secret"}
    assert "sk-secret" not in repr(settings)
