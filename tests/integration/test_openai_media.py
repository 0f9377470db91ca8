"""Media and candidates through the engine, to an endpoint in a process of its own that takes them, or does not."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.errors import ConfigError, NoVideoError, SampleError, TransientError
from airflow_vlm_provider.types import (
    Answer,
    Choice,
    FrameSampling,
    Media,
    Part,
    Request,
    SourceMedia,
)
from tests.support.fakes import FakeMedia
from tests.support.openai_engines import (
    NAME,
    ask,
    ask_all,
    engine_for,
    picture,
    request_about,
    run_engine,
    until,
)
from tests.support.place import Place
from tests.support.stub_endpoint import StubServer, start_stub, tag_of
from tests.support.video_step import VideoStep

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with start_stub() as server:
        yield server


def clip(index: int) -> bytes:
    return b"clip %d" % index + bytes(2000)


def about_video(index: int = 0, **more: Any) -> Request:
    video = Media("video", "video/mp4", clip(index), f"{index}.mp4")
    return Request(**{"system": "Caption.", "parts": (video, "Describe this video."), **more})


# Videos


def test_a_video_is_sent_as_one(stub):
    answer = ask(engine_for(stub), about_video(3))
    assert tag_of(clip(3)) in answer.choices[0].text
    assert stub.stats()["by_media"] == {"video_url": 1}


def test_a_model_without_videos_is_found_out_once(stub, caplog):
    stub.set(videos=False, latency=0.05)

    async def use(engine: OpenAIEngine) -> list[Any]:
        assert engine.takes_video
        first = await asyncio.gather(*(engine.ask(about_video(n)) for n in range(24)), return_exceptions=True)
        assert not engine.takes_video
        found_out = stub.stats()["requests"]
        second = await asyncio.gather(*(engine.ask(about_video(n)) for n in range(8)), return_exceptions=True)
        # Nothing more is sent to find out what is known.
        assert stub.stats()["requests"] == found_out
        return [*first, *second, await engine.ask(request_about(1))]

    with caplog.at_level(logging.WARNING, "airflow_vlm_provider"):
        *errors, answer = run_engine(engine_for(stub, concurrency=4, max_attempts=1), use)
    assert {type(error) for error in errors} == {NoVideoError}
    assert isinstance(answer, Answer)
    stats = stub.stats()
    assert 1 <= stats["by_fault"]["no_video"] <= 4
    # What was sent is told, so that it can be counted.
    assert sum(error.attempts for error in errors) == stats["by_fault"]["no_video"]
    (record,) = [each for each in caplog.records if "takes no videos" in each.getMessage()]
    assert NAME in record.getMessage()


def test_a_known_refusal_does_not_wait_for_a_place_in_the_window(stub):
    stub.set(videos=False)

    async def use(engine: OpenAIEngine) -> Any:
        await asyncio.gather(engine.ask(about_video()), return_exceptions=True)
        stub.set(script=["hang"])
        hanging = asyncio.ensure_future(engine.ask(request_about()))
        await until(stub, lambda stats: stats["in_flight"] == 1)
        errors = await asyncio.wait_for(
            asyncio.gather(engine.ask(about_video(1)), return_exceptions=True), 10
        )
        hanging.cancel()
        return errors[0]

    assert isinstance(run_engine(engine_for(stub, concurrency=1), use), NoVideoError)


def test_a_video_that_backs_off_while_it_turns_out_that_none_is_taken_is_not_sent_again(stub):
    stub.set(script=["rate_limit"], videos=True)

    async def use(engine: OpenAIEngine) -> Any:
        waiting = asyncio.ensure_future(engine.ask(about_video(1)))
        await until(stub, lambda stats: stats["by_status"])
        stub.set(videos=False, script=[])
        return await asyncio.gather(engine.ask(about_video(2)), waiting, return_exceptions=True)

    errors = run_engine(engine_for(stub, concurrency=1), use)
    assert [(type(error), error.attempts) for error in errors] == [(NoVideoError, 1)] * 2
    assert stub.stats()["requests"] == 2


@pytest.mark.parametrize("fault", ["bad_video", "context_length", "too_large", "opaque_400"])
def test_a_video_at_fault_is_no_reason_to_send_none(stub, fault):
    stub.set(script=[fault])

    async def use(engine: OpenAIEngine) -> list[Any]:
        errors = await asyncio.gather(engine.ask(about_video()), return_exceptions=True)
        assert engine.takes_video
        return [*errors, await engine.ask(about_video(1))]

    error, answer = run_engine(engine_for(stub), use)
    assert isinstance(error, SampleError)
    assert (error.kind, error.attempts) == ("rejected", 1)
    assert tag_of(clip(1)) in answer.choices[0].text


def test_a_model_that_answered_about_a_video_takes_videos_whatever_it_says_of_another(stub):
    stub.set(script=["ok", "no_video"])
    answers = ask_all(engine_for(stub, concurrency=1), [about_video(index) for index in range(3)])
    assert [type(answer) for answer in answers] == [Answer, SampleError, Answer]
    assert (answers[1].kind, answers[1].attempts) == ("rejected", 1)


@pytest.mark.parametrize("videos", [True, False])
def test_videos_with_all_that_an_endpoint_may_not_do(stub, videos):
    stub.set(videos=videos, reject=["response_format", "max_tokens"])
    request = about_video(schema={"type": "object"}, sampling={"max_tokens": 50})
    answer = ask(engine_for(stub, max_attempts=1), request)
    if videos:
        assert answer.usage.requests == 3
    else:
        # Whichever it refuses first, the refusal of the video comes out.
        assert (type(answer), answer.attempts) == (NoVideoError, 3)


# Whole shards


class Videos(FakeMedia):
    """Videos whose content is their name; their frames are two pictures."""

    def prepare(
        self, source: SourceMedia, *, frames: FrameSampling | None = None, as_video: bool = False, **how: Any
    ) -> Sequence[Part]:
        if as_video:
            return (Media("video", "video/mp4", source.data, source.ref),)
        images = [Media("image", "image/jpeg", b"%d of " % at + source.data, source.ref) for at in range(2)]
        return ("Two frames of a video:", *images)


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    place.media = Videos()
    return place


def _rows(count: int) -> list[dict[str, str]]:
    return [{"video": f"{index}.mp4"} for index in range(count)]


def test_a_shard_of_videos_is_committed_by_frames_where_the_endpoint_takes_no_videos(stub, place):
    stub.set(videos=False, latency=0.02)
    engine = engine_for(stub, concurrency=4)
    (manifest,) = place.run(engine, place.shard("a.jsonl", _rows(30)), step=VideoStep("auto"))
    assert (manifest.counts.rows_in, manifest.counts.ok, manifest.counts.failed) == (30, 30, 0)
    for row in place.output():
        for at in range(2):
            assert tag_of(b"%d of %s" % (at, row["video"].encode())) in row["caption"]
    stats = stub.stats()
    refused = stats["by_fault"]["no_video"]
    assert 1 <= refused <= 4
    assert stats["by_media"] == {"video_url": refused, "image_url": 60}
    # Every request that the endpoint saw is in the manifest, the refused ones, too.
    assert manifest.counts.requests == stats["requests"] == 30 + refused


def test_a_shard_that_has_to_go_as_videos_names_the_remedy(stub, place):
    stub.set(videos=False)
    with pytest.raises(ConfigError, match="transport='frames'"):
        place.run(engine_for(stub), place.shard("a.jsonl", _rows(3)), step=VideoStep("video"))
    assert place.committed_files() == set()


def test_one_bad_video_is_a_dead_letter_and_the_others_are_still_sent_as_videos(stub, place):
    stub.set(image_faults={tag_of(b"1.mp4")[4:]: "bad_video"})
    (manifest,) = place.run(engine_for(stub), place.shard("a.jsonl", _rows(5)), step=VideoStep("auto"))
    assert (manifest.counts.ok, manifest.kinds) == (4, {"rejected": 1})
    (letter,) = place.errors()
    assert "Could not open video stream" in letter["message"]
    assert stub.stats()["by_media"] == {"video_url": 5}


# Large bodies


@pytest.mark.parametrize("size", [200_000, 16_000_000])
def test_a_body_that_a_gateway_refuses_before_it_is_read(stub, size):
    stub.set(max_body=100_000)
    large = Media("video", "video/mp4", bytes(size), "large.mp4")
    answers = ask_all(
        engine_for(stub, concurrency=1, max_attempts=2),
        [about_video(), about_video(parts=(large, "Describe it.")), about_video(1)],
    )
    error = answers.pop(1)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert isinstance(error, SampleError)
    assert not isinstance(error, TransientError)
    assert (error.kind, error.attempts) == ("rejected", 1)
    assert "max_pixels" in error.message
    assert "max_frames" in error.message


def test_a_large_video_arrives_whole(stub):
    data = bytes(range(256)) * 62_500
    answer = ask(
        engine_for(stub), about_video(parts=(Media("video", "video/mp4", data, "l"), "Describe it."))
    )
    assert tag_of(data) in answer.choices[0].text


# Detail


@pytest.mark.parametrize("detail", [None, "low", "high"])
def test_detail_is_said_of_every_image_and_of_nothing_else(detail):
    """What the endpoint gets, byte for byte."""
    seen: list[dict[str, Any]] = []

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length")
            )
            seen.append(json.loads(await reader.readexactly(length)))
            body = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            writer.write(body)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        images = [Media("image", "image/jpeg", picture(index), "") for index in range(2)]
        video = Media("video", "video/mp4", clip(0), "")
        engine = OpenAIEngine(base_url=f"http://127.0.0.1:{port}/v1", model="m", detail=detail)
        async with server, engine:
            await engine.ask(Request(None, (images[0], video, images[1], "What?")))

    asyncio.run(main())
    first, video, second, _ = seen[0]["messages"][0]["content"]
    expected = set() if detail is None else {detail}
    assert {part["image_url"].get("detail") for part in (first, second)} - {None} == expected
    assert set(video["video_url"]) == {"url"}


# Candidates


def test_candidates_are_one_request_a_picture(stub):
    answers = ask_all(engine_for(stub), [request_about(index, n=4) for index in range(12)])
    for index, answer in enumerate(answers):
        assert len({choice.text for choice in answer.choices}) == 4
        assert all(tag_of(picture(index)) in choice.text for choice in answer.choices)
    stats = stub.stats()
    assert set(stats["by_image"].values()) == {1}
    assert (len(stats["by_image"]), stats["requests"]) == (12, 12)
    # The prompt is billed once, however many candidates there are.
    alone = ask(engine_for(stub), request_about(0)).usage.prompt_tokens
    assert {answer.usage.prompt_tokens for answer in answers} == {alone}


def test_an_endpoint_that_gives_fewer_candidates_than_asked_for_is_told_of(stub, caplog):
    stub.set(most_choices=1)
    with caplog.at_level(logging.WARNING, "airflow_vlm_provider"):
        answers = ask_all(engine_for(stub), [request_about(index, n=4) for index in range(3)])
    assert Counter(len(answer.choices) for answer in answers) == {1: 3}
    (record,) = [each for each in caplog.records if "candidates" in each.getMessage()]
    assert "asked for 4" in record.getMessage()


def test_content_in_parts_is_put_together(stub):
    whole = ask(engine_for(stub))
    stub.set(script=["parts"])
    assert ask(engine_for(stub)).choices == whole.choices


@pytest.mark.parametrize(
    ("fault", "choice"),
    [
        ("refusal", Choice("I can't help with that image.", "refusal")),
        ("filtered", Choice("", "refusal")),
        ("empty", Choice("", "stop")),
    ],
)
def test_every_useless_candidate_says_what_it_is(stub, fault, choice):
    stub.set(script=[fault])
    assert ask(engine_for(stub), about_video(n=3)).choices == (choice,) * 3


def test_candidates_that_are_cut_say_so(stub):
    stub.set(script=["length"])
    choices = ask(engine_for(stub), about_video(n=3)).choices
    assert [choice.finish_reason for choice in choices] == ["length"] * 3
    assert all(choice.text for choice in choices)
