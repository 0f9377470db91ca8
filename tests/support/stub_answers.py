"""What the stub endpoint says: answers made from the media, and the errors that real endpoints give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FIXED_TAGS = ("stub", "picture", "four-corners", "made-up")

_NONE: dict[str, str] = {}


def _error(
    message: str, *, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> Any:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# The wording follows what OpenAI and vLLM send: engines can only tell some of these apart by their words.
_RESPONSES: dict[str, tuple[int, Any]] = {
    "rate_limit": (
        429,
        _error("Rate limit reached for requests", kind="requests", code="rate_limit_exceeded"),
    ),
    "rate_limit_bare": (429, _error("Too many requests")),
    "quota": (
        429,
        _error(
            "You exceeded your current quota, please check your plan and billing details.",
            kind="insufficient_quota",
            code="insufficient_quota",
        ),
    ),
    "server_error": (500, _error("The server had an error", kind="server_error")),
    "unavailable": (503, _error("The model is overloaded", kind="server_error")),
    "overloaded": (529, _error("Overloaded", kind="overloaded_error")),
    "context_length": (
        400,
        _error(
            "This model's maximum context length is 4096 tokens. Your messages resulted in 9000 tokens.",
            code="context_length_exceeded",
            param="messages",
        ),
    ),
    "bad_image": (
        400,
        _error("The image data does not represent a valid image.", code="invalid_image"),
    ),
    "bad_video": (400, _error("Could not open video stream", kind="BadRequestError")),
    "no_video": (
        400,
        _error(
            "Invalid value: 'video_url'. Supported values are: 'text', 'image_url', 'input_audio', 'refusal', "
            "'audio', and 'file'.",
            code="invalid_value",
            param="messages[1].content[0].type",
        ),
    ),
    "content_filter_400": (
        400,
        _error("The prompt triggered the content management policy.", code="content_filter"),
    ),
    "too_large": (413, _error("Request entity too large")),
    "forbidden": (403, _error("Country not supported", code="unsupported_country_region_territory")),
    "unknown_model": (
        404,
        _error("The model does not exist or you do not have access to it.", code="model_not_found"),
    ),
    "bad_parameter": (
        400,
        _error("Invalid value: temperature", code="invalid_value", param="temperature"),
    ),
    "opaque_400": (400, _error("Something is wrong")),
    "refuse_response_format": (
        400,
        _error("'response_format' of type 'json_schema' is not supported with this model."),
    ),
    "refuse_max_tokens": (
        400,
        _error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            code="unsupported_parameter",
            param="max_tokens",
        ),
    ),
}


def fault_response(fault: str, *, quoting: str = "") -> Any:
    """Status, headers and body of an error; None when the fault is not an HTTP error."""
    if fault == "unauthorized":
        return 401, _NONE, _error(f"Incorrect API key provided: {quoting}", code="invalid_api_key")
    if fault.startswith("refuse:"):
        name = fault.partition(":")[2]
        return 400, _NONE, _error(f"Unrecognized request argument supplied: {name}", param=None)
    if fault not in _RESPONSES:
        return None
    status, body = _RESPONSES[fault]
    return status, _NONE, body


def refused(
    body: Mapping[str, Any],
    kinds: Sequence[str],
    *,
    reject: Sequence[str],
    models: Sequence[str],
    videos: bool,
) -> str | None:
    """The fault that this body's model, parameters or media deserve.

    :param kinds: The types of its media.
    """
    if models and body["model"] not in models:
        return "unknown_model"
    for name in reject:
        if name in body:
            return f"refuse_{name}" if f"refuse_{name}" in _RESPONSES else f"refuse:{name}"
    return "no_video" if not videos and "video_url" in kinds else None


def tag_of_digest(digest: str) -> str:
    return f"img-{digest[:8]}"


def compose(
    body: Mapping[str, Any], digests: Sequence[str], fault: str, *, most_choices: int
) -> dict[str, Any]:
    """A chat completion that names the media, bent the way the fault says."""
    n = min(body.get("n", 1), most_choices)
    choices = [_choice(body, digests, fault, index) for index in range(n)]
    words = sum(len((choice["message"]["content"] or "").split()) for choice in choices)
    prompt = 256 * len(digests) + len(str(body["messages"][0]["content"])[:2000].split())
    return {
        "id": f"chatcmpl-{digests[0][:12]}",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words},
    }


def _choice(body: Mapping[str, Any], digests: Sequence[str], fault: str, index: int) -> dict[str, Any]:
    fixed = [FIXED_TAGS[(index + place) % len(FIXED_TAGS)] for place in range(len(FIXED_TAGS))]
    tags = [*(tag_of_digest(digest) for digest in digests), *fixed]
    sentence = "A picture of " + ", ".join(tags) + "."
    response_format = body.get("response_format") or {}
    if response_format.get("type") == "json_schema":
        content: str | None = json.dumps(_fill(response_format["json_schema"]["schema"], tags, sentence))
    elif "JSON" in str(body["messages"][0]["content"]):
        content = json.dumps({"tags": tags})
    else:
        content = sentence
    message: dict[str, Any] = {"role": "assistant", "content": content}
    reason = "stop"
    if fault == "messy":
        message["content"] = _messy(tags, int(digests[0][-4:], 16))
    elif fault == "refusal":
        message.update(content=None, refusal="I can't help with that image.")
    elif fault == "filtered":
        message["content"], reason = "", "content_filter"
    elif fault == "length":
        message["content"], reason = str(content)[: len(str(content)) // 2], "length"
    elif fault == "parts":
        middle = len(str(content)) // 2
        halves = (str(content)[:middle], str(content)[middle:])
        message["content"] = [{"type": "text", "text": half} for half in halves]
    elif fault == "empty":
        message.update(content=None, reasoning_content="It is hard to say.")
    return {"index": index, "message": message, "finish_reason": reason}


def _fill(schema: Mapping[str, Any], tags: Sequence[str], sentence: str) -> Any:
    """A value that satisfies the schema, as far as this project's schemas go."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: _fill(part, tags, sentence) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        if schema.get("items", {}).get("type") == "string":
            return list(tags)[: schema.get("maxItems")]
        return [_fill(schema["items"], tags, sentence)]
    return {"integer": 1, "number": 1.0, "boolean": True}.get(str(kind), sentence[: schema.get("maxLength")])


def _messy(tags: Sequence[str], pick: int) -> str:
    """The ways in which models without constrained output spoil an answer."""
    whole = json.dumps({"tags": list(tags)})
    return (
        f"Sure! Here are the tags:\n```json\n{whole}\n```\nLet me know if you need more.",
        f"<think>What is there?</think>{whole}",
        json.dumps(list(tags)),
        "Tags: " + ", ".join(tags),
        "\n".join(f"- {tag}" for tag in tags),
        str({"tags": list(tags)}),
        whole[: whole.rindex(",")],
    )[pick % 7]
