"""The engine against an endpoint in a process of its own: what is sent, what comes back, what stays secret."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_vlm_provider.engines.client import make_client
from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.errors import ConfigError, EngineError
from airflow_vlm_provider.types import Answer, Choice, Media, Request, Usage
from tests.support.openai_engines import (
    KEY,
    NAME,
    ask,
    ask_all,
    engine_for,
    picture,
    request_about,
    run_engine,
    until,
)
from tests.support.stub_endpoint import StubServer, start_stub, tag_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


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
        answers = ask_all(engine_for(stub, concurrency=48), [request_about(index) for index in range(count)])
        stats = stub.stats()
    assert [type(answer) for answer in answers] == [Answer] * count
    for index, answer in enumerate(answers):
        assert tag_of(picture(index)) in answer.choices[0].text
    assert {fault for fault, times in stats["by_fault"].items() if times} == {*faults, "ok"}
    assert stats["by_fault"]["ok"] == count
    # Each HTTP request is accounted for, by the answer that it was sent for.
    assert sum(answer.usage.requests for answer in answers) == stats["requests"] > count
    for index, answer in enumerate(answers):
        assert answer.usage.requests == stats["by_image"][tag_of(picture(index))[4:]]


def test_answers_are_the_same_in_whatever_order_they_come():
    requests = [request_about(index, n=2) for index in range(30)]
    with start_stub(jitter=0.05) as stub:
        one_by_one, at_once = (ask_all(engine_for(stub, concurrency=window), requests) for window in (1, 30))
    assert one_by_one == at_once
    assert all(isinstance(answer, Answer) for answer in at_once)


def test_an_answer_with_candidates_several_images_model_and_usage(stub):
    first, second = (Media("image", "image/png", picture(index), "") for index in (1, 2))
    request = request_about(parts=(first, "and", second), n=3, sampling={"temperature": 0.5})
    answer = ask(engine_for(stub), request)
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
    assert ask(engine_for(stub)).choices == (choice,)


def test_an_answer_cut_at_max_tokens(stub):
    stub.set(script=["length"])
    assert ask(engine_for(stub)).choices[0].finish_reason == "length"


def test_structured_output_can_be_off(stub):
    stub.set(reject=["response_format"])
    assert ask(engine_for(stub, structured_output=False)).usage.requests == 1


@pytest.mark.parametrize("endpoint", ["/chat/completions", "chat/completions", "{root}/v1/chat/completions"])
def test_api_endpoint(stub, endpoint):
    engine = engine_for(stub, api_endpoint=endpoint.format(root=stub.root))
    assert tag_of(picture(0)) in ask(engine).choices[0].text


# How much is sent


def test_the_window_is_filled_and_never_exceeded():
    with start_stub(latency=0.2) as stub:
        answers = ask_all(engine_for(stub, concurrency=7), [request_about(index) for index in range(40)])
        stats = stub.stats()
    assert all(isinstance(answer, Answer) for answer in answers)
    assert stats["max_concurrent"] == 7


def test_a_request_that_backs_off_lets_others_pass(stub):
    stub.set(script=["server_error"])
    answers = ask_all(engine_for(stub, concurrency=1), [request_about(0), request_about(1)])
    assert [answer.usage.requests for answer in answers] == [2, 1]
    asked = [image for _, image, _ in stub.stats()["log"]]
    assert asked == [tag_of(picture(index))[4:] for index in (0, 1, 0)]


@pytest.mark.parametrize(("retry_after", "seconds"), [("1", 1.0), ("ms:700", 0.7), ("date:3", 2.0)])
def test_retry_after_holds_up_the_whole_engine(stub, retry_after, seconds):
    stub.set(script=["ok", "rate_limit"], retry_after=retry_after)
    answers = ask_all(engine_for(stub, concurrency=1), [request_about(index) for index in range(6)])
    assert all(isinstance(answer, Answer) for answer in answers)
    log = stub.stats()["log"]
    assert [fault for _, _, fault in log] == ["ok", "rate_limit", *["ok"] * 5]
    assert log[2][0] - log[1][0] >= seconds


def _seconds_until_all_were_sent(stub: StubServer, engine: OpenAIEngine, requests: list[Request]) -> float:
    async def use(engine: OpenAIEngine) -> float:
        start = time.monotonic()
        await asyncio.gather(*map(engine.ask, requests))
        return stub.stats()["log"][-1][0] - start

    return run_engine(engine, use)


def test_requests_per_minute(stub):
    # Two may go out at once, and another one each half second.
    engine = engine_for(stub, requests_per_minute=120)
    assert _seconds_until_all_were_sent(stub, engine, [request_about(index) for index in range(7)]) >= 2.4


def test_tokens_per_minute(stub):
    # 258 tokens of prompt and the reserved 1000 each: ten requests go out at once, and then one a second.
    engine = engine_for(stub, tokens_per_minute=60 * 1258, concurrency=1)
    requests = [request_about(index, sampling={"max_tokens": 1000}) for index in range(12)]
    assert _seconds_until_all_were_sent(stub, engine, requests) >= 1.9


# Cancelling and closing


def test_cancelling_frees_the_window_and_the_endpoint(stub):
    async def use(engine: OpenAIEngine) -> Answer:
        stub.set(script=["hang", "hang"])
        asking = [asyncio.ensure_future(engine.ask(request_about(index))) for index in range(6)]
        await until(stub, lambda stats: stats["in_flight"] == 2)
        for task in asking:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)
        assert all(task.cancelled() for task in asking)
        return await asyncio.wait_for(engine.ask(request_about(9)), 10)

    assert isinstance(run_engine(engine_for(stub, concurrency=2), use), Answer)
    stats = stub.stats()
    # The four that waited for a place were never sent, and the two that were are let go of.
    assert stats["requests"] == 3
    assert stats["abandoned"] == 2
    assert stats["in_flight"] == 0


def test_cancelling_during_a_pause_sends_nothing_more(stub):
    async def use(engine: OpenAIEngine) -> None:
        stub.set(script=["rate_limit"], retry_after="30")
        asking = [asyncio.ensure_future(engine.ask(request_about(index))) for index in range(4)]
        await until(stub, lambda stats: stats["by_status"])
        for task in asking:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)

    run_engine(engine_for(stub, concurrency=1), use)
    assert stub.stats()["requests"] == 1


@pytest.mark.parametrize("fault", ["rate_limit", "hang"])
def test_closing_ends_what_still_waits(stub, fault):
    async def main() -> list[Any]:
        async with engine_for(stub, concurrency=1) as engine:
            stub.set(script=[fault], retry_after="30")
            asking = [asyncio.ensure_future(engine.ask(request_about(index))) for index in range(4)]
            await until(stub, lambda stats: stats["requests"])
        return await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)

    errors = asyncio.run(main())
    assert {type(error) for error in errors} == {EngineError}
    assert "closed" in str(errors[0])


def test_a_given_client_stays_open_and_its_own_is_closed(stub):
    async def main() -> tuple[bool, bool]:
        async with make_client(base_url=stub.base_url, api_key=KEY) as client:
            async with OpenAIEngine(client=client, model="m") as engine:
                await engine.ask(request_about())
            given = client.is_closed()
        async with engine_for(stub) as engine:
            await engine.ask(request_about())
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
            engine = engine_for(stub, headers={"X-Gateway": token})
        else:
            client = make_client(base_url=stub.base_url, api_key=KEY, headers={"X-Gateway": token})
            engine = OpenAIEngine(client=client, model="m")
        async with engine:
            return (await asyncio.gather(engine.ask(request_about()), return_exceptions=True))[0]

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
        assert secret not in repr(dict(engine_for(stub, headers={"X-Gateway": token}).parameters()))


# Settings


def test_parameters_decide_answers_and_nothing_else(stub):
    one = engine_for(stub, model_params={"top_k": 1})
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
        assert engine_for(stub, **{"model_params": {"top_k": 1}, **other}).parameters() != one.parameters()


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
