from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import pytest

from airflow_vlm_provider.engines import chat
from airflow_vlm_provider.engines.chat import ResponsePath, build_body, read_answer
from airflow_vlm_provider.engines.failures import PassingError
from airflow_vlm_provider.types import Choice, Media, MediaRef, Request, Usage

JPEG = Media("image", "image/jpeg", b"\xff\xd8one", "a.jpg")
PNG = Media("image", "image/png", b"\x89PNGtwo", "b.png")
SCHEMA = {"type": "object", "properties": {"tags": {"type": "array"}}}


def _body(request: Request, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "model": "m",
        "model_params": {},
        "structured": True,
        "completion_tokens": False,
        "detail": None,
    }
    return asyncio.run(build_body(request, **{**defaults, **options}))


def _url(media: Media) -> str:
    return f"data:{media.mime};base64,{base64.b64encode(media.data).decode()}"


def test_system_comes_first_and_text_and_media_keep_their_order():
    body = _body(Request("Be brief.", ("First", JPEG, "then", PNG)))
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "First"},
                    {"type": "image_url", "image_url": {"url": _url(JPEG)}},
                    {"type": "text", "text": "then"},
                    {"type": "image_url", "image_url": {"url": _url(PNG)}},
                ],
            },
        ],
    }


def test_text_alone_is_a_plain_string_and_no_system_prompt_is_none():
    assert _body(Request(None, ("Hello",)))["messages"] == [{"role": "user", "content": "Hello"}]


def test_videos_and_detail():
    video = Media("video", "video/mp4", b"mp4", "v.mp4")
    content = _body(Request(None, (video, JPEG)), detail="low")["messages"][0]["content"]
    assert content == [
        {"type": "video_url", "video_url": {"url": _url(video)}},
        {"type": "image_url", "image_url": {"url": _url(JPEG), "detail": "low"}},
    ]


def test_sampling_outranks_model_params_and_none_is_left_out():
    request = Request(None, ("x",), sampling={"temperature": 0.2, "top_k": 5, "seed": None})
    body = _body(request, model_params={"temperature": 1.0, "repetition_penalty": 1.1})
    assert (body["temperature"], body["top_k"], body["repetition_penalty"]) == (0.2, 5, 1.1)
    assert "seed" not in body


def test_neither_sampling_nor_model_params_change_model_or_messages():
    body = _body(Request(None, ("x",), sampling={"model": "other"}), model_params={"model": "third"})
    assert body["model"] == "m"


def test_n_is_sent_when_there_are_several():
    assert "n" not in _body(Request(None, ("x",)))
    assert _body(Request(None, ("x",), n=4))["n"] == 4


def test_schema_is_sent_when_answers_can_be_structured():
    request = Request(None, ("x",), schema=SCHEMA)
    assert _body(request)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
    }
    assert "response_format" not in _body(request, structured=False)
    assert "response_format" not in _body(Request(None, ("x",)))


def test_max_tokens_by_its_newer_name():
    request = Request(None, ("x",), sampling={"max_tokens": 7})
    assert _body(request)["max_tokens"] == 7
    renamed = _body(request, completion_tokens=True)
    assert renamed["max_completion_tokens"] == 7
    assert "max_tokens" not in renamed


@pytest.mark.parametrize(("size", "off_the_loop"), [(40_000, False), (1_200_000, True)])
def test_large_media_are_encoded_off_the_event_loop(monkeypatch, size, off_the_loop):
    threads = []
    encode = chat._data_url
    monkeypatch.setattr(
        chat, "_data_url", lambda medium: threads.append(threading.get_ident()) or encode(medium)
    )
    media = Media("image", "image/png", bytes(size), "a")
    content = _body(Request(None, (media, "x")))["messages"][0]["content"]
    assert content[0]["image_url"]["url"] == _url(media)
    assert [thread != threading.get_ident() for thread in threads] == [off_the_loop]


def test_media_that_were_not_loaded_are_a_bug():
    with pytest.raises(TypeError, match=r"a\.jpg"):
        _body(Request(None, (MediaRef("image", "a.jpg"), "x")))


def _response(*messages: dict[str, Any], reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    choices = [
        {"index": index, "message": message, "finish_reason": reason}
        for index, message in enumerate(messages)
    ]
    return {"model": "m-0613", "choices": choices, **more}


def _read(data: Any, path: str | None = None) -> tuple[Choice, ...]:
    return read_answer(data, path=ResponsePath(path), model="m", requests=1).choices


def test_answer_with_candidates_model_and_usage():
    usage = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
    data = _response({"content": "a"}, {"content": "b"}, usage=usage)
    answer = read_answer(data, path=ResponsePath(), model="m", requests=3)
    assert answer.choices == (Choice("a"), Choice("b"))
    assert answer.model == "m-0613"
    assert answer.usage == Usage(3, 12, 5)


@pytest.mark.parametrize("usage", [None, "none", {}, {"prompt_tokens": None}])
def test_usage_may_be_missing(usage):
    answer = read_answer(_response({"content": "a"}, usage=usage), path=ResponsePath(), model="m", requests=1)
    assert answer.usage == Usage(1, 0, 0)


@pytest.mark.parametrize(
    ("message", "reason", "choice"),
    [
        ({"content": "cut"}, "length", Choice("cut", "length")),
        ({"content": ""}, "content_filter", Choice("", "refusal")),
        ({"content": None, "refusal": "No."}, "stop", Choice("No.", "refusal")),
        ({"refusal": "No."}, "stop", Choice("No.", "refusal")),
        ({"content": "fine", "refusal": None}, "stop", Choice("fine")),
        ({"content": None, "reasoning_content": "Hm."}, "stop", Choice("")),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "stop", Choice("ab")),
        ({"content": "x"}, "tool_calls", Choice("x", "other")),
        ({"content": "x"}, None, Choice("x", "other")),
    ],
)
def test_finish_reasons(message, reason, choice):
    assert _read(_response(message, reason=reason)) == (choice,)


@pytest.mark.parametrize("path", [None, "choices.0.message", "choices.*.message.content"])
def test_what_the_server_broke_off_is_no_answer(path):
    response = _response({"content": "a whole one"}, {"content": "a par"})
    response["choices"][0 if path == "choices.0.message" else 1]["finish_reason"] = "abort"
    with pytest.raises(PassingError, match="broke off the answer"):
        _read(response, path)


def test_data_juicers_path_stands_for_all_candidates():
    assert _read(_response({"content": "a"}, {"content": "b"}), "choices.0.message.content") == (
        Choice("a"),
        Choice("b"),
    )


@pytest.mark.parametrize(
    ("data", "path", "texts"),
    [
        ({"choices": [{"text": "a", "finish_reason": "length"}]}, "choices.*.text", [Choice("a", "length")]),
        ({"output": {"text": "a"}}, "output.text", [Choice("a")]),
        ({"results": ["a", "b"]}, "results.1", [Choice("b")]),
        ({"results": ["a", "b"]}, "results.-1", [Choice("b")]),
        ({"output": {"tags": ["ü"]}}, "output", [Choice('{"tags": ["ü"]}')]),
    ],
)
def test_other_paths(data, path, texts):
    assert list(_read(data, path)) == texts


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"choices": []}, None),
        ({"choices": None}, None),
        ({}, None),
        ({"choices": [{"index": 0}]}, None),
        ({"choices": ["a"]}, "choices.3"),
        ({"choices": ["a"]}, "choices.first"),
        ({"choices": [{"finish_reason": "stop"}]}, "choices.*.text"),
    ],
)
def test_nothing_at_the_path(data, path):
    with pytest.raises(LookupError):
        _read(data, path)
