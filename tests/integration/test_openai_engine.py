"""The engine against an endpoint in a process of its own that fails in real ways."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from airflow_vlm_provider.engines.client import make_client
from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, TransientError
from airflow_vlm_provider.types import Answer, Choice, Media, Request, Usage
from tests.support.stub_endpoint import StubServer, start_stub, tag_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

T = TypeVar("T")
KEY = "sk-very-secret-0123456789"
NAME = "connection 'vlm_default'"
SCHEMA = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}


def _picture(index: int) -> bytes:
    return b"\xff\xd8picture %d" % index + bytes(2000)


def _request(index: int = 0, **more: Any) -> Request:
    media = Media("image", "image/jpeg", _picture(index), f"{index}.jpg")
    return Request(**{"system": "Tag.", "parts": (media, "Tag this image."), "schema": SCHEMA, **more})


def _engine(stub: StubServer, **options: Any) -> OpenAIEngine:
    return OpenAIEngine(
        **{"base_url": stub.base_url, "api_key": KEY, "model": "m", "name": NAME, "timeout": 20.0, **options}
    )


def _run(engine: OpenAIEngine, use: Callable[[OpenAIEngine], Awaitable[T]]) -> T:
    async def main() -> T:
        async with engine:
            return await use(engine)

    return asyncio.run(main())


def _ask_all(engine: OpenAIEngine, requests: list[Request]) -> list[Any]:
    """The answers or errors, in the order of the requests, which are all asked at once."""

    async def use(engine: OpenAIEngine) -> list[Any]:
        return await asyncio.gather(*map(engine.ask, requests), return_exceptions=True)

    return _run(engine, use)


def _ask(engine: OpenAIEngine, request: Request | None = None) -> Any:
    return _ask_all(engine, [request or _request()])[0]


async def _until(stub: StubServer, condition: Callable[[dict[str, Any]], Any]) -> None:
    # The endpoint is another process: there is no event to wait for.
    while not condition(await asyncio.to_thread(stub.stats)):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with start_stub() as server:
        yield server


# What comes back


def test_through_faults_every_request_gets_the_answer_to_its_own_picture():
    count = 400
    faults = {
        "rate_limit_bare": 0.10,
        "server_error": 0.05,
        "reset": 0.02,
        "truncated": 0.01,
        "disconnect": 0.01,
    }
    with start_stub(latency=0.005, jitter=0.05, seed=7, faults=faults) as stub:
        answers = _ask_all(_engine(stub, concurrency=48), [_request(index) for index in range(count)])
        stats = stub.stats()
    assert [type(answer) for answer in answers] == [Answer] * count
    for index, answer in enumerate(answers):
        assert tag_of(_picture(index)) in answer.choices[0].text
    assert {fault for fault, times in stats["by_fault"].items() if times} == {*faults, "ok"}
    assert stats["by_fault"]["ok"] == count
    # Each HTTP request is accounted for, by the answer that it was sent for.
    assert sum(answer.usage.requests for answer in answers) == stats["requests"] > count
    for index, answer in enumerate(answers):
        assert answer.usage.requests == stats["by_image"][tag_of(_picture(index))[4:]]


def test_answers_are_the_same_in_whatever_order_they_come():
    requests = [_request(index, n=2) for index in range(30)]
    with start_stub(jitter=0.05) as stub:
        one_by_one, at_once = (_ask_all(_engine(stub, concurrency=window), requests) for window in (1, 30))
    assert one_by_one == at_once
    assert all(isinstance(answer, Answer) for answer in at_once)


def test_an_answer_with_candidates_several_images_model_and_usage(stub):
    first, second = (Media("image", "image/png", _picture(index), "") for index in (1, 2))
    request = _request(parts=(first, "and", second), n=3, sampling={"temperature": 0.5})
    answer = _ask(_engine(stub), request)
    assert len(answer.choices) == len(set(answer.choices)) == 3
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert choice.text.index(tag_of(first.data)) < choice.text.index(tag_of(second.data))
    assert answer.model == "m"
    assert stub.stats()["requests"] == 1
    # As the stub bills: 256 tokens for a picture, and each word of the prompt and of the answers.
    words = sum(len(choice.text.split()) for choice in answer.choices)
    assert answer.usage == Usage(1, 2 * 256 + len(["Tag."]), words)


@pytest.mark.parametrize(
    ("fault", "choice"),
    [
        ("refusal", Choice("I can't help with that image.", "refusal")),
        ("filtered", Choice("", "refusal")),
        ("empty", Choice("")),
    ],
)
def test_answers_without_content(stub, fault, choice):
    stub.set(script=[fault])
    assert _ask(_engine(stub)).choices == (choice,)


def test_an_answer_cut_at_max_tokens(stub):
    stub.set(script=["length"])
    assert _ask(_engine(stub)).choices[0].finish_reason == "length"


def test_structured_output_can_be_off(stub):
    stub.set(reject=["response_format"])
    assert _ask(_engine(stub, structured_output=False)).usage.requests == 1


@pytest.mark.parametrize("endpoint", ["/chat/completions", "chat/completions", "{root}/v1/chat/completions"])
def test_api_endpoint(stub, endpoint):
    engine = _engine(stub, api_endpoint=endpoint.format(root=stub.root))
    assert tag_of(_picture(0)) in _ask(engine).choices[0].text


# How much is sent


def test_the_window_is_filled_and_never_exceeded():
    with start_stub(latency=0.2) as stub:
        answers = _ask_all(_engine(stub, concurrency=7), [_request(index) for index in range(40)])
        stats = stub.stats()
    assert all(isinstance(answer, Answer) for answer in answers)
    assert stats["max_concurrent"] == 7


def test_a_request_that_backs_off_lets_others_pass(stub):
    stub.set(script=["server_error"])
    answers = _ask_all(_engine(stub, concurrency=1), [_request(0), _request(1)])
    assert [answer.usage.requests for answer in answers] == [2, 1]
    asked = [image for _, image, _ in stub.stats()["log"]]
    assert asked == [tag_of(_picture(index))[4:] for index in (0, 1, 0)]


@pytest.mark.parametrize(("retry_after", "seconds"), [("1", 1.0), ("ms:700", 0.7), ("date:3", 2.0)])
def test_retry_after_holds_up_the_whole_engine(stub, retry_after, seconds):
    stub.set(script=["ok", "rate_limit"], retry_after=retry_after)
    answers = _ask_all(_engine(stub, concurrency=1), [_request(index) for index in range(6)])
    assert all(isinstance(answer, Answer) for answer in answers)
    log = stub.stats()["log"]
    assert [fault for _, _, fault in log] == ["ok", "rate_limit", *["ok"] * 5]
    assert log[2][0] - log[1][0] >= seconds


def _seconds_until_all_were_sent(stub: StubServer, engine: OpenAIEngine, requests: list[Request]) -> float:
    async def use(engine: OpenAIEngine) -> float:
        start = time.monotonic()
        await asyncio.gather(*map(engine.ask, requests))
        return stub.stats()["log"][-1][0] - start

    return _run(engine, use)


def test_requests_per_minute(stub):
    # Two may go out at once, and another one each half second.
    engine = _engine(stub, requests_per_minute=120)
    assert _seconds_until_all_were_sent(stub, engine, [_request(index) for index in range(7)]) >= 2.4


def test_tokens_per_minute(stub):
    # 258 tokens of prompt and the reserved 1000 each: ten requests go out at once, and then one a second.
    engine = _engine(stub, tokens_per_minute=60 * 1258, concurrency=1)
    requests = [_request(index, sampling={"max_tokens": 1000}) for index in range(12)]
    assert _seconds_until_all_were_sent(stub, engine, requests) >= 1.9


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
    answer = _ask(_engine(stub, max_attempts=2, timeout=0.5))
    assert answer.usage.requests == 2
    stub.set(script=[fault, fault])
    error = _ask(_engine(stub, max_attempts=2, timeout=0.5))
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
    answers = _ask_all(_engine(stub, concurrency=1), [_request(index) for index in range(4)])
    error = answers.pop(1)
    assert isinstance(error, SampleError)
    assert (error.kind, error.attempts) == (kind, 1)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert stub.stats()["requests"] == 4


def test_text_that_cannot_be_sent_harms_no_other(stub):
    first, second = _ask_all(_engine(stub), [_request(parts=("\ud800",)), _request()])
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
    errors = _ask_all(_engine(stub, concurrency=1, **options), [_request(index) for index in range(10)])
    assert {type(error) for error in errors} == {ConfigError}
    for word in words:
        assert word in str(errors[0])
    # Nothing was sent after the first refusal, but for the one question without a schema.
    assert sum(stub.stats()["by_status"].values()) <= 2


def test_the_same_rejection_of_all_from_the_start_is_a_wrong_setting(stub):
    stub.set(faults={"opaque_400": 1.0})
    errors = _ask_all(_engine(stub, concurrency=1), [_request(index) for index in range(30)])
    assert [type(error) for error in errors] == [SampleError] * 15 + [ConfigError] * 15
    assert "Something is wrong" in str(errors[-1])
    assert stub.stats()["requests"] == 16


# What the endpoint cannot do


def test_an_endpoint_without_schemas_is_asked_without_from_then_on(stub, caplog):
    stub.set(reject=["response_format"], latency=0.05)
    with caplog.at_level(logging.WARNING, "airflow_vlm_provider"):
        # A single attempt is enough: the question is put again, nothing has failed.
        answers = _ask_all(
            _engine(stub, concurrency=4, max_attempts=1), [_request(index) for index in range(24)]
        )
    assert all(isinstance(answer, Answer) for answer in answers)
    assert 1 <= stub.stats()["by_fault"]["refuse_response_format"] <= 4
    assert stub.stats()["by_fault"]["ok"] == 24
    assert len([record for record in caplog.records if "JSON schema" in record.message]) == 1


def test_max_tokens_goes_by_its_newer_name_where_it_must(stub):
    stub.set(reject=["max_tokens"])
    requests = [_request(index, sampling={"max_tokens": 50}) for index in range(10)]
    answers = _ask_all(_engine(stub, concurrency=2, max_attempts=1), requests)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert 1 <= stub.stats()["by_fault"]["refuse_max_tokens"] <= 2


def test_both_at_once(stub):
    stub.set(reject=["max_tokens", "response_format"])
    answer = _ask(_engine(stub, max_attempts=1), _request(sampling={"max_tokens": 50}))
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
    errors = _ask_all(engine, [_request(index) for index in range(10)])
    assert {type(error) for error in errors} == {EngineError}
    for words in (NAME, url, "could not be reached"):
        assert words in str(errors[0])


def test_an_endpoint_that_comes_back_in_time_is_waited_for():
    port = _free_port()

    async def use(engine: OpenAIEngine) -> list[Answer]:
        asking = asyncio.gather(*(engine.ask(_request(index)) for index in range(5)))
        await asyncio.sleep(0.5)
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, start_stub(port=port))
            return await asking

    # Not a single failed attempt is allowed: being unreachable is not counted as one.
    engine = OpenAIEngine(base_url=f"http://127.0.0.1:{port}/v1", model="m", max_attempts=1)
    assert all(answer.usage.requests > 1 for answer in _run(engine, use))


def test_an_endpoint_that_only_fails_ends_the_engine(stub):
    stub.set(faults={"unavailable": 1.0})
    errors = _ask_all(_engine(stub, max_attempts=1, concurrency=1), [_request(index) for index in range(30)])
    assert [type(error) for error in errors] == [TransientError] * 15 + [EngineError] * 15
    assert stub.stats()["requests"] == 16


def test_one_request_that_always_fails_does_not_end_the_engine(stub):
    async def use(engine: OpenAIEngine) -> list[Any]:
        await engine.ask(_request(0))
        stub.set(script=["server_error"] * 3)
        failed = await asyncio.gather(engine.ask(_request(1)), return_exceptions=True)
        return [*failed, await engine.ask(_request(2))]

    error, answer = _run(_engine(stub, max_attempts=3, outage_timeout=0.001), use)
    assert isinstance(error, TransientError)
    assert isinstance(answer, Answer)


def test_a_wait_that_is_too_long_for_a_task_ends_the_engine(stub):
    stub.set(script=["rate_limit"], retry_after="3600")
    errors = _ask_all(_engine(stub, concurrency=1), [_request(index) for index in range(5)])
    assert {type(error) for error in errors} == {EngineError}
    assert stub.stats()["requests"] == 1


# Cancelling and closing


def test_cancelling_frees_the_window_and_the_endpoint(stub):
    async def use(engine: OpenAIEngine) -> Answer:
        stub.set(script=["hang", "hang"])
        asking = [asyncio.ensure_future(engine.ask(_request(index))) for index in range(6)]
        await _until(stub, lambda stats: stats["in_flight"] == 2)
        for task in asking:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)
        assert all(task.cancelled() for task in asking)
        return await asyncio.wait_for(engine.ask(_request(9)), 10)

    assert isinstance(_run(_engine(stub, concurrency=2), use), Answer)
    stats = stub.stats()
    # The four that waited for a place were never sent, and the two that were are let go of.
    assert stats["requests"] == 3
    assert stats["abandoned"] == 2
    assert stats["in_flight"] == 0


def test_cancelling_during_a_pause_sends_nothing_more(stub):
    async def use(engine: OpenAIEngine) -> None:
        stub.set(script=["rate_limit"], retry_after="30")
        asking = [asyncio.ensure_future(engine.ask(_request(index))) for index in range(4)]
        await _until(stub, lambda stats: stats["by_status"])
        for task in asking:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)

    _run(_engine(stub, concurrency=1), use)
    assert stub.stats()["requests"] == 1


@pytest.mark.parametrize("fault", ["rate_limit", "hang"])
def test_closing_ends_what_still_waits(stub, fault):
    async def main() -> list[Any]:
        async with _engine(stub, concurrency=1) as engine:
            stub.set(script=[fault], retry_after="30")
            asking = [asyncio.ensure_future(engine.ask(_request(index))) for index in range(4)]
            await _until(stub, lambda stats: stats["requests"])
        return await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)

    errors = asyncio.run(main())
    assert {type(error) for error in errors} == {EngineError}
    assert "closed" in str(errors[0])


def test_a_given_client_stays_open_and_its_own_is_closed(stub):
    async def main() -> tuple[bool, bool]:
        async with make_client(base_url=stub.base_url, api_key=KEY) as client:
            async with OpenAIEngine(client=client, model="m") as engine:
                await engine.ask(_request())
            given = client.is_closed()
        async with _engine(stub) as engine:
            await engine.ask(_request())
            own = engine._client
        assert own is not None
        return given, own.is_closed()

    assert asyncio.run(main()) == (False, True)


# Secrets


@pytest.mark.parametrize("give", ["key", "client"])
def test_neither_key_nor_header_gets_out(stub, caplog, give):
    token = "token-of-the-gateway-42"
    stub.set(api_key="another")

    async def main() -> Any:
        if give == "key":
            engine = _engine(stub, headers={"X-Gateway": token})
        else:
            client = make_client(base_url=stub.base_url, api_key=KEY, headers={"X-Gateway": token})
            engine = OpenAIEngine(client=client, model="m")
        async with engine:
            return (await asyncio.gather(engine.ask(_request()), return_exceptions=True))[0]

    with caplog.at_level(logging.DEBUG):
        error = asyncio.run(main())
    assert isinstance(error, ConfigError)
    # The endpoint did quote them.
    assert "authorization" in str(error)
    assert "x-gateway" in str(error)
    shown = "".join(traceback.format_exception(error))
    link: BaseException | None = error
    while link is not None:
        shown += repr(link.args)
        link = link.__cause__ or link.__context__
    for secret in (KEY, token):
        assert secret not in shown
        assert secret not in caplog.text
        assert secret not in repr(dict(_engine(stub, headers={"X-Gateway": token}).parameters()))


# Settings


def test_parameters_decide_answers_and_nothing_else(stub):
    one = _engine(stub, model_params={"top_k": 1})
    elsewhere = OpenAIEngine(
        base_url="http://elsewhere/v1",
        api_key="other",
        model="m",
        model_params={"top_k": 1},
        concurrency=1,
        timeout=1,
        requests_per_minute=3,
    )
    assert one.parameters() == elsewhere.parameters()
    for other in ({"model": "x"}, {"model_params": {}}, {"structured_output": False}, {"detail": "low"}):
        assert _engine(stub, **{"model_params": {"top_k": 1}, **other}).parameters() != one.parameters()


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"timeout": 0},
        {"requests_per_minute": -1},
        {"tokens_per_minute": 0},
        {"max_attempts": 0},
        {"outage_timeout": 0},
        {"base_url": "host:80"},
        {"api_key": "a\nb"},
        {"headers": {"X": "a\nb"}},
        {"model_params": {"api_key": KEY}},
        {"model_params": {"stream": True}},
    ],
)
def test_settings_that_cannot_work_are_told_before_anything_is_sent(options):
    with pytest.raises(ConfigError) as caught:
        OpenAIEngine(**{"base_url": "http://host/v1", "model": "m", "name": NAME, **options})
    assert NAME in str(caught.value)
    assert KEY not in str(caught.value)


def test_either_a_client_or_an_address():
    with pytest.raises(TypeError):
        OpenAIEngine(model="m")
