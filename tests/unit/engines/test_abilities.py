from __future__ import annotations

import logging

import pytest

from airflow_vlm_provider.engines.abilities import Abilities
from airflow_vlm_provider.engines.failures import UnsupportedError
from airflow_vlm_provider.errors import NoVideoError, SampleError
from airflow_vlm_provider.types import Answer, Choice, Media, Request

NAME = "connection 'vlm_default'"
ENDPOINT = "http://host/v1/chat/completions"
VIDEO = Request(None, (Media("video", "video/mp4", b"mp4", "a.mp4"), "What happens?"))
IMAGE = Request(None, (Media("image", "image/png", b"png", "a.png"), "What is it?"))
ANSWER = Answer((Choice("something"),), "m")


@pytest.fixture
def abilities() -> Abilities:
    return Abilities(name=NAME, endpoint=ENDPOINT, structured=True)


def test_everything_is_believed_possible_at_first(abilities):
    assert (abilities.video, abilities.structured, abilities.completion_tokens) == (True, True, False)
    abilities.check(VIDEO, attempts=0)


def test_structured_output_can_be_off_from_the_start():
    assert not Abilities(name=NAME, endpoint=ENDPOINT, structured=False).structured


def test_each_refusal_is_learnt_from_and_said_once(abilities, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            abilities.do_without(UnsupportedError("response_format", "no such thing"))
            abilities.do_without(UnsupportedError("max_tokens", "use the other"))
            assert isinstance(abilities.without_video(NoVideoError("at most 0")), NoVideoError)
    assert (abilities.video, abilities.structured, abilities.completion_tokens) == (False, False, True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all(NAME in sentence and ENDPOINT in sentence for sentence in said)
    assert "no such thing" in said[0]
    assert "takes no videos (at most 0)" in said[1]


def test_without_videos_only_requests_that_hold_one_are_stopped(abilities):
    abilities.without_video(NoVideoError("at most 0"))
    abilities.check(IMAGE, attempts=0)
    with pytest.raises(NoVideoError) as caught:
        abilities.check(VIDEO, attempts=2)
    assert caught.value.attempts == 2


def test_a_model_that_has_answered_about_a_video_takes_videos(abilities):
    abilities.answered(IMAGE, ANSWER)
    abilities.answered(VIDEO, ANSWER)
    error = abilities.without_video(NoVideoError("this video is not supported"))
    assert isinstance(error, SampleError)
    assert error.kind == "rejected"
    assert "this video is not supported" in error.message
    assert abilities.video


def test_an_answer_about_a_picture_says_nothing_of_videos(abilities):
    abilities.answered(IMAGE, ANSWER)
    assert isinstance(abilities.without_video(NoVideoError("at most 0")), NoVideoError)


def test_an_endpoint_that_ignores_n_is_told_of_once(abilities, caplog):
    request = Request(None, ("x",), n=4)
    with caplog.at_level(logging.WARNING):
        abilities.answered(request, Answer((Choice("a"),) * 4, "m"))
        assert not caplog.records
        abilities.answered(request, ANSWER)
        abilities.answered(request, ANSWER)
    (record,) = caplog.records
    assert "asked for 4 candidates" in record.getMessage()
    assert "gave 1" in record.getMessage()
