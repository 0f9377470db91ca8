from __future__ import annotations

import email.utils
import json
import time
from typing import Any

import pytest

from airflow_vlm_provider.engines.failures import (
    Diagnosis,
    PassingError,
    UnsupportedError,
    public_url,
    retry_after,
)
from airflow_vlm_provider.errors import ConfigError, EngineError, NoVideoError, SampleError

KEY = "sk-very-secret-0123456789"
SENT = {
    "model": "m",
    "messages": [],
    "temperature": 0,
    "top_k": 3,
    "stop": ["x"],
    "max_tokens": 100,
    "response_format": {"type": "json_schema"},
}


def _sent(*kinds: str) -> dict[str, Any]:
    parts = [{"type": kind, kind: {"url": "data:,"}} for kind in kinds]
    return {**SENT, "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]}


VIDEO = _sent("video_url")


@pytest.fixture
def diagnosis() -> Diagnosis:
    return Diagnosis(
        name="connection 'vlm_default'",
        endpoint="http://host/v1",
        model="m",
        secrets=[KEY, "Bearer " + KEY, "ab"],
    )


def _openai(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def _vllm(message: str, param: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": "BadRequestError", "param": param, "code": 400}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass(diagnosis, status):
    error = diagnosis.of_status(status, {"retry-after": "7"}, "try later", SENT)
    assert isinstance(error, PassingError)
    assert error.retry_after == 7
    assert error.reason == ("rate_limit" if status == 429 else "other")


def test_a_wait_longer_than_a_task_should_block_ends_the_task(diagnosis):
    error = diagnosis.of_status(429, {"retry-after": "7200"}, "come back later", SENT)
    assert isinstance(error, EngineError)
    assert "7200 s" in str(error)
    assert "retry_delay" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        _openai("You exceeded your current quota, please check your plan.", "insufficient_quota"),
        {"message": "no more", "type": "insufficient_quota", "code": None},
    ],
)
def test_no_credit_is_no_rate_limit(diagnosis, body):
    error = diagnosis.of_status(429, {}, body, SENT)
    assert isinstance(error, ConfigError)
    assert "billing" in str(error)


@pytest.mark.parametrize("status", [401, 403])
def test_no_access(diagnosis, status):
    error = diagnosis.of_status(status, {}, _openai("Incorrect API key provided"), SENT)
    assert isinstance(error, ConfigError)
    assert "connection 'vlm_default'" in str(error)
    assert "password" in str(error)


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (
            404,
            _openai("The model `m` does not exist or you do not have access to it.", "model_not_found"),
            "'m'",
        ),
        (404, {"message": "model 'm' not found, try pulling it first"}, "'m'"),
        (400, _openai("invalid model ID", "invalid_model"), "'m'"),
        (404, {"detail": "Not Found"}, "http://host/v1"),
        (404, "<html>nginx</html>", "http://host/v1"),
        (405, {"detail": "Method Not Allowed"}, "http://host/v1"),
        (402, {"message": "Insufficient credits"}, "Insufficient credits"),
    ],
)
def test_model_route_and_account_are_settings(diagnosis, status, body, named):
    error = diagnosis.of_status(status, {}, body, SENT)
    assert isinstance(error, ConfigError)
    assert named in str(error)


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (400, _openai("Unrecognized request argument supplied: top_k"), "top_k"),
        (
            400,
            _openai(
                "Unsupported value: 'temperature' does not support 0", "unsupported_value", "temperature"
            ),
            None,
        ),
        (400, _openai("Invalid value", "invalid_value", "stop"), "stop"),
        (400, _openai("Invalid value for 'stop'."), "stop"),
        (400, _vllm("temperature must be non-negative, got -1."), "temperature"),
        (
            400,
            _vllm("[{'type': 'extra_forbidden', 'loc': ('body', 'top_k'), 'msg': 'Extra inputs'}]"),
            "top_k",
        ),
        (
            422,
            {"detail": [{"loc": ["body", "temperature"], "msg": "Input should be a number"}]},
            "temperature",
        ),
        (400, _openai("Unknown parameter: 'frobnicate'.", "unknown_parameter"), "frobnicate"),
        (400, _openai("bad", "invalid_value", "model"), "model"),
        (400, _vllm("m is not a multimodal model"), "vision-language"),
        (
            400,
            _openai("Invalid content type. image_url is only supported by certain models."),
            "vision-language",
        ),
    ],
)
def test_parameters_are_settings(diagnosis, status, body, named):
    error = diagnosis.of_status(status, {}, body, SENT)
    assert isinstance(error, ConfigError)
    assert (named or "temperature") in str(error)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (
            400,
            _openai("This model's maximum context length is 4096 tokens.", "context_length_exceeded"),
            "rejected",
        ),
        (
            400,
            _vllm("The decoder prompt (length 5000) is longer than the maximum model length of 4096."),
            "rejected",
        ),
        (
            400,
            _vllm(
                "'max_tokens' or 'max_completion_tokens' is too large: 9. Maximum context length is 4.",
                "max_tokens",
            ),
            "rejected",
        ),
        (413, "Request Entity Too Large", "rejected"),
        (400, _openai("Invalid image.", "invalid_image", "messages.[1].content.[0].image_url"), "rejected"),
        (400, _vllm("cannot identify image file <_io.BytesIO object>"), "rejected"),
        (400, _vllm("At most 1 image(s) may be provided in one prompt.", "image"), "rejected"),
        (
            400,
            _vllm("At most 2 video(s) may be provided in one prompt. (parameter=video)", "video"),
            "rejected",
        ),
        (400, _vllm("Could not open video stream"), "rejected"),
        (
            400,
            _openai("Invalid type for 'messages[1].content[0]'.", "invalid_type", "messages[1]"),
            "rejected",
        ),
        (400, _openai("Something is wrong, stop it."), "rejected"),
        (400, _openai("Filtered by the content management policy.", "content_filter"), "refused"),
        (400, _openai("Your request was rejected by our safety system.", "moderation_blocked"), "refused"),
    ],
)
def test_a_requests_own_fault(diagnosis, status, body, kind):
    error = diagnosis.of_status(status, {}, body, SENT)
    assert isinstance(error, SampleError)
    assert error.kind == kind


def _tag(kind: str) -> dict[str, Any]:
    message = (
        f"Input tag '{kind}' found using 'type' does not match any of the expected tags: 'text', 'image_url'"
    )
    where = ["body", "messages", 0, "content", 1]
    return {"detail": [{"type": "union_tag_invalid", "loc": where, "msg": message}]}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, _vllm("At most 0 video(s) may be provided in one prompt. (parameter=video)", "video")),
        (
            400,
            _openai(
                "Invalid value: 'video_url'. Supported values are: 'text', 'image_url', 'input_audio' and 'file'.",
                "invalid_value",
                "messages[1].content[0].type",
            ),
        ),
        (400, _openai("Invalid content type. video_url is only supported by certain models.")),
        (400, _vllm("Unknown part type: video_url")),
        (400, _vllm("Only image modality is supported")),
        (422, _tag("video_url")),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "Input should be 'text' or 'image_url'"}]}),
        (422, "messages[0]: unknown variant `video_url`, expected `text` or `image_url` at line 1"),
        (422, "Failed to deserialize: messages[0]: data did not match any variant of untagged enum Body"),
        (400, "Content blocks are expected to be either text or image_url type."),
        (400, "litellm.BadRequestError: OpenAIException - This model does not support video input."),
        (400, {"message": "Video inputs are not supported by this model."}),
        (400, {"message": "unsupported content[].type"}),
        (500, {"message": "unsupported content[].type"}),
        (501, {"message": "Video input is not supported"}),
        (400, {"message": "Unsupported modality: video."}),
        (404, {"message": "No endpoints found that support input video"}),
        (415, {"message": "Videos are unsupported"}),
    ],
)
def test_a_model_without_videos(diagnosis, status, body):
    assert isinstance(diagnosis.of_status(status, {}, body, VIDEO), NoVideoError)
    # Said of a request without a video, it means something else.
    for kinds in (("text", "image_url"), ()):
        assert not isinstance(diagnosis.of_status(status, {}, body, _sent(*kinds)), NoVideoError)


def test_a_server_in_trouble_says_nothing_of_videos(diagnosis):
    for status in (429, 500, 502, 503):
        assert isinstance(
            diagnosis.of_status(status, {}, "The video model is overloaded", VIDEO), PassingError
        )


def test_a_model_without_videos_may_say_so_in_a_200(diagnosis):
    body = {"error": {"code": 400, "message": "This model does not support video input"}}
    assert isinstance(diagnosis.of_content(body, VIDEO), NoVideoError)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "Could not open video stream", "rejected"),
        (400, "Failed to apply Processor on data={'text': '<|video_pad|>', 'videos': []}", "rejected"),
        (
            400,
            "This model's maximum context length is 1024 tokens. However, video_url is not supported beyond it.",
            "rejected",
        ),
        (400, "The video is too long; videos are not supported beyond 60 s.", "rejected"),
        (400, "This model does not support video longer than 60 seconds.", "rejected"),
        (400, "We don't support video codec 'av1'.", "rejected"),
        (400, "Invalid value for 'messages[0].content[0].video_url.url': no base64.", "rejected"),
        (400, "Invalid value: video_url.url is no data URL, in messages[0].content[0].", "rejected"),
        (400, "We don't support video_url.fps in messages[0].content[0].", "rejected"),
        (400, "Video content is not allowed by the safety policy.", "refused"),
        (400, "At most 1 video(s) may be provided in one prompt.", "rejected"),
        (413, "Request Entity Too Large", "rejected"),
    ],
)
def test_a_video_that_is_at_fault_itself(diagnosis, status, message, kind):
    error = diagnosis.of_status(status, {}, _vllm(message), VIDEO)
    assert isinstance(error, SampleError)
    assert error.kind == kind


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (413, "Request Entity Too Large"),
        (400, "This model's maximum context length is 4096 tokens."),
        (400, "At most 4 image(s) may be provided in one prompt."),
    ],
)
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_what_is_too_much_names_the_remedy(diagnosis, status, message, kind):
    said = str(diagnosis.of_status(status, {}, message, _sent("text", kind)))
    assert message.rstrip(".") in said
    assert "max_pixels" in said
    assert "max_frames" in said
    assert "max_pixels" not in str(diagnosis.of_status(status, {}, message, SENT))


def test_of_an_endless_message_only_the_beginning_is_read(diagnosis):
    echo = "Invalid user message: " + "A" * 20_000 + " video is not supported"
    assert isinstance(diagnosis.of_status(400, {}, echo, VIDEO), SampleError)


@pytest.mark.parametrize(
    "body",
    [
        _openai("Invalid parameter: 'response_format' of type 'json_schema' is not supported."),
        _openai("Invalid schema for response_format 'answer'", None, "response_format"),
        _openai("bad schema", "invalid", "response_format.json_schema.schema"),
        _vllm("Structured outputs backend failed to compile the grammar"),
        _vllm("guided decoding is disabled"),
    ],
)
def test_an_endpoint_without_schemas_is_told_from_a_bad_request(diagnosis, body):
    error = diagnosis.of_status(400, {}, body, SENT)
    assert isinstance(error, UnsupportedError)
    assert error.feature == "response_format"
    without = {name: value for name, value in SENT.items() if name != "response_format"}
    assert not isinstance(diagnosis.of_status(400, {}, body, without), UnsupportedError)


def test_the_newer_name_of_max_tokens_is_heard_of(diagnosis):
    body = _openai(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "unsupported_parameter",
        "max_tokens",
    )
    error = diagnosis.of_status(400, {}, body, SENT)
    assert isinstance(error, UnsupportedError)
    assert error.feature == "max_tokens"
    assert isinstance(diagnosis.of_status(400, {}, body, {"max_completion_tokens": 1}), ConfigError)


@pytest.mark.parametrize(
    "body",
    [
        _openai(f"Incorrect API key provided: {KEY}"),
        {"error": f"headers: Authorization: Bearer {KEY}"},
        {"detail": [{"loc": ["body", "temperature"], "input": KEY}]},
        KEY + "x" * 10_000,
        "x" * 490 + KEY,
        None,
        ["odd", KEY],
    ],
)
@pytest.mark.parametrize("status", [302, 400, 401, 404, 418, 422, 429, 500])
def test_no_message_holds_a_secret_or_is_endless(diagnosis, status, body):
    message = str(diagnosis.of_status(status, {}, body, SENT))
    assert KEY not in message
    assert KEY[:12] not in message
    assert "\n" not in message
    assert len(message) < 1000


def test_short_values_are_no_secrets_and_words_stay_whole(diagnosis):
    assert diagnosis.quote("a table about labs") == "a table about labs"


def test_a_200_that_holds_an_error_is_judged_by_its_code(diagnosis):
    assert isinstance(diagnosis.of_content({"error": {"code": 401, "message": "no"}}, SENT), ConfigError)
    assert isinstance(
        diagnosis.of_content({"error": {"code": 429, "message": "slow down"}}, SENT), PassingError
    )
    assert isinstance(
        diagnosis.of_content({"error": {"code": "x", "message": "upstream"}}, SENT), PassingError
    )
    assert isinstance(diagnosis.of_content("<html>", SENT), PassingError)
    assert isinstance(diagnosis.of_content({"choices": []}, SENT), PassingError)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Fri, 01 Jan 1999 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after-ms": "nan?"}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    date = email.utils.formatdate(1_800_000_042, usegmt=True)
    assert retry_after({"retry-after": date}) == 42


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host:8443/v1?key=secret#x", "https://host:8443/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url, shown):
    assert public_url(url) == shown


def test_an_error_body_that_was_not_unwrapped_is_read_too(diagnosis):
    body = {"error": _openai("The model `m` does not exist", "model_not_found")}
    assert "has no model" in str(diagnosis.of_status(404, {}, body, SENT))
    assert "has no model" not in str(diagnosis.of_status(404, {}, json.dumps({"a": 1}), SENT))
