"""The engine against an endpoint in a process of its own that fails in real ways, refuses things, or is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, TransientError
from airflow_vlm_provider.types import Answer
from tests.support.openai_engines import (
    KEY,
    NAME,
    ask,
    ask_all,
    engine_for,
    request_about,
    run_engine,
)
from tests.support.stub_endpoint import StubServer, start_stub

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with start_stub() as server:
        yield server


# What passes, and what does not


@pytest.mark.parametrize(
    "fault",
    [
        "server_error", "unavailable", "overloaded", "rate_limit_bare", "reset", "disconnect", "truncated",
        "truncated_json", "not_json", "drip", "hang",
    ],
)  # fmt: skip
def test_what_may_pass_is_asked_again_and_given_up_in_the_end(stub, fault):
    stub.set(script=[fault])
    answer = ask(engine_for(stub, max_attempts=2, timeout=0.5))
    assert answer.usage.requests == 2
    stub.set(script=[fault, fault])
    error = ask(engine_for(stub, max_attempts=2, timeout=0.5))
    assert isinstance(error, TransientError)
    assert (error.kind, error.attempts) == ("transient", 2)
    assert NAME in error.message
    assert stub.stats()["by_fault"] == {"ok": 1, fault: 3}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("context_length", "rejected"),
        ("bad_image", "rejected"),
        ("too_large", "rejected"),
        ("opaque_400", "rejected"),
        ("content_filter_400", "refused"),
    ],
)
def test_a_samples_own_fault_costs_one_request_and_harms_no_other(stub, fault, kind):
    stub.set(script=["ok", fault])
    answers = ask_all(engine_for(stub, concurrency=1), [request_about(index) for index in range(4)])
    error = answers.pop(1)
    assert isinstance(error, SampleError)
    assert (error.kind, error.attempts) == (kind, 1)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert stub.stats()["requests"] == 4


def test_text_that_cannot_be_sent_harms_no_other(stub):
    first, second = ask_all(engine_for(stub), [request_about(parts=("\ud800",)), request_about()])
    assert isinstance(first, SampleError)
    assert isinstance(second, Answer)


@pytest.mark.parametrize(
    ("options", "stub_options", "words"),
    [
        ({}, {"script": ["quota"]}, ["billing", NAME]),
        ({}, {"script": ["forbidden"]}, ["password", NAME]),
        ({"api_key": "wrong-key"}, {"api_key": KEY}, ["password", NAME]),
        ({}, {"models": ["other"]}, ["'m'", NAME]),
        ({"api_endpoint": "/nothing"}, {}, ["/v1/nothing", NAME]),
        ({"model_params": {"top_k": 3}}, {"reject": ["top_k"]}, ["'top_k'", "model_params"]),
        ({"response_path": "choices.*.text"}, {}, ["choices.*.text"]),
        ({"model_params": {"response_format": {}}}, {"reject": ["response_format"]}, ["response_format"]),
    ],
)
def test_wrong_settings_fail_at_once_and_for_all(stub, options, stub_options, words):
    stub.set(**stub_options)
    errors = ask_all(
        engine_for(stub, concurrency=1, **options), [request_about(index) for index in range(10)]
    )
    assert {type(error) for error in errors} == {ConfigError}
    for word in words:
        assert word in str(errors[0])
    # Nothing was sent after the first refusal, but for the one question without a schema.
    assert sum(stub.stats()["by_status"].values()) <= 2


def test_the_same_rejection_of_all_from_the_start_is_a_wrong_setting(stub):
    stub.set(faults={"opaque_400": 1.0})
    errors = ask_all(engine_for(stub, concurrency=1), [request_about(index) for index in range(30)])
    assert [type(error) for error in errors] == [SampleError] * 15 + [ConfigError] * 15
    assert "Something is wrong" in str(errors[-1])
    assert stub.stats()["requests"] == 16


# What the endpoint cannot do


def test_an_endpoint_without_schemas_is_asked_without_from_then_on(stub, caplog):
    stub.set(reject=["response_format"], latency=0.05)
    with caplog.at_level(logging.WARNING, "airflow_vlm_provider"):
        # A single attempt is enough: the question is put again, nothing has failed.
        answers = ask_all(
            engine_for(stub, concurrency=4, max_attempts=1), [request_about(index) for index in range(24)]
        )
    assert all(isinstance(answer, Answer) for answer in answers)
    assert 1 <= stub.stats()["by_fault"]["refuse_response_format"] <= 4
    assert stub.stats()["by_fault"]["ok"] == 24
    assert len([record for record in caplog.records if "JSON schema" in record.message]) == 1


def test_max_tokens_goes_by_its_newer_name_where_it_must(stub):
    stub.set(reject=["max_tokens"])
    requests = [request_about(index, sampling={"max_tokens": 50}) for index in range(10)]
    answers = ask_all(engine_for(stub, concurrency=2, max_attempts=1), requests)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert 1 <= stub.stats()["by_fault"]["refuse_max_tokens"] <= 2


def test_both_at_once(stub):
    stub.set(reject=["max_tokens", "response_format"])
    answer = ask(engine_for(stub, max_attempts=1), request_about(sampling={"max_tokens": 50}))
    assert answer.usage.requests == 3


# When the endpoint is gone


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "no-such-host.invalid"])
def test_an_endpoint_that_cannot_be_reached_ends_the_engine(host):
    url = f"http://{host.format(port=_free_port())}/v1"
    engine = OpenAIEngine(base_url=url, model="m", name=NAME, outage_timeout=0.5, concurrency=2)
    errors = ask_all(engine, [request_about(index) for index in range(10)])
    assert {type(error) for error in errors} == {EngineError}
    for words in (NAME, url, "could not be reached"):
        assert words in str(errors[0])


def test_an_endpoint_that_comes_back_in_time_is_waited_for():
    port = _free_port()

    async def use(engine: OpenAIEngine) -> list[Answer]:
        asking = asyncio.gather(*(engine.ask(request_about(index)) for index in range(5)))
        await asyncio.sleep(0.5)
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, start_stub(port=port))
            return await asking

    # Not a single failed attempt is allowed: being unreachable is not counted as one.
    engine = OpenAIEngine(base_url=f"http://127.0.0.1:{port}/v1", model="m", max_attempts=1)
    assert all(answer.usage.requests > 1 for answer in run_engine(engine, use))


def test_an_endpoint_that_only_fails_ends_the_engine(stub):
    stub.set(faults={"unavailable": 1.0})
    errors = ask_all(
        engine_for(stub, max_attempts=1, concurrency=1), [request_about(index) for index in range(30)]
    )
    assert [type(error) for error in errors] == [TransientError] * 15 + [EngineError] * 15
    assert stub.stats()["requests"] == 16


def test_one_request_that_always_fails_does_not_end_the_engine(stub):
    async def use(engine: OpenAIEngine) -> list[Any]:
        await engine.ask(request_about(0))
        stub.set(script=["server_error"] * 3)
        failed = await asyncio.gather(engine.ask(request_about(1)), return_exceptions=True)
        return [*failed, await engine.ask(request_about(2))]

    error, answer = run_engine(engine_for(stub, max_attempts=3, outage_timeout=0.001), use)
    assert isinstance(error, TransientError)
    assert isinstance(answer, Answer)


def test_a_wait_that_is_too_long_for_a_task_ends_the_engine(stub):
    stub.set(script=["rate_limit"], retry_after="3600")
    errors = ask_all(engine_for(stub, concurrency=1), [request_about(index) for index in range(5)])
    assert {type(error) for error in errors} == {EngineError}
    assert stub.stats()["requests"] == 1
