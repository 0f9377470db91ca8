"""Chat completions on the wire: a request's body, and the answer in a response."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from airflow_vlm_provider.engines.failures import PassingError
from airflow_vlm_provider.types import Answer, Choice, FinishReason, Media, Request, Usage

_LARGE = 1_000_000
"""Bytes of media from which encoding would hold up the event loop for more than a millisecond."""

_FINISH_REASONS: dict[Any, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "refusal"}


async def build_body(
    request: Request,
    *,
    model: str,
    model_params: Mapping[str, Any],
    structured: bool,
    completion_tokens: bool,
    detail: str | None,
) -> dict[str, Any]:
    """Write a request as the body of a chat completion.

    :param model_params: Merged into the body below the request's own sampling.
    :param structured: Whether to ask for answers in the request's schema.
    :param completion_tokens: Whether ``max_tokens`` goes by its newer name, ``max_completion_tokens``.
    :param detail: ``detail`` of every image; None leaves it to the endpoint.
    """
    media = [part for part in request.parts if isinstance(part, Media)]
    if sum(len(medium.data) for medium in media) > _LARGE:
        urls = iter(await asyncio.to_thread(lambda: [_data_url(medium) for medium in media]))
    else:
        urls = map(_data_url, media)
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": request.system})
    messages.append({"role": "user", "content": _content(request, urls, detail)})
    body = {**model_params, **{name: value for name, value in request.sampling.items() if value is not None}}
    body.update(model=model, messages=messages)
    if request.n > 1:
        body["n"] = request.n
    if structured and request.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if completion_tokens and "max_tokens" in body:
        body["max_completion_tokens"] = body.pop("max_tokens")
    return body


def _content(request: Request, urls: Iterator[str], detail: str | None) -> str | list[dict[str, Any]]:
    if len(request.parts) == 1 and isinstance(request.parts[0], str):
        # Endpoints of text models often take nothing but a string.
        return request.parts[0]
    content: list[dict[str, Any]] = []
    for part in request.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif not isinstance(part, Media):
            raise TypeError(f"The {part.kind} {part.ref!r} must be loaded before the request is sent.")
        elif part.kind == "video":
            # Which of a clip's frames are looked at is the server's to decide, and can't be said here: vLLM refuses
            # media_io_kwargs and mm_processor_kwargs in a request unless it was started to trust them. By itself vLLM
            # 0.32 shows Qwen's models two frames of each second of the clip's own time (Qwen2.5-VL an even number of
            # them), and most others 32 frames. Clips have to be made for that.
            content.append({"type": "video_url", "video_url": {"url": next(urls)}})
        else:
            image = {"url": next(urls)} if detail is None else {"url": next(urls), "detail": detail}
            content.append({"type": "image_url", "image_url": image})
    return content


def _data_url(medium: Media) -> str:
    return f"data:{medium.mime};base64,{base64.b64encode(medium.data).decode('ascii')}"


class ResponsePath:
    """Where the answers' texts are in a response, as a dotted path; ``*`` takes every item of a list.

    :param path: ``choices.*.message.content`` and, as Data-Juicer writes it, ``choices.0.message.content`` both
        stand for all candidates of a chat completion.
    """

    DEFAULT = "choices.*.message.content"

    def __init__(self, path: str | None = None) -> None:
        path = path or self.DEFAULT
        self.text = self.DEFAULT if path == "choices.0.message.content" else path
        self._steps = self.text.split(".")

    def read(self, data: Any) -> tuple[Choice, ...]:
        """The candidates in a response.

        :raises LookupError: there is nothing at the path.
        :raises PassingError: the server broke off the answer.
        """
        found = list(_walk(data, self._steps, {}))
        if not found:
            raise LookupError(f"nothing at {self.text}")
        return tuple(_choice(value, holder) for value, holder in found)


def _walk(
    value: Any, steps: Sequence[str], holder: Mapping[str, Any]
) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield what is at the end of the path, with the choice (what has a finish reason) that it is part of."""
    if not steps:
        yield value, holder
        return
    step, rest = steps[0], steps[1:]
    if isinstance(value, Mapping):
        if "finish_reason" in value:
            holder = value
        if step == "content" and holder and not rest:
            # Some endpoints leave out what is null, as the content is beside a refusal.
            yield value.get(step), holder
            return
        if step not in value:
            raise LookupError(f"no {step!r} among {', '.join(map(str, value))}")
        yield from _walk(value[step], rest, holder)
    elif isinstance(value, list) and step == "*":
        for item in value:
            yield from _walk(item, rest, holder)
    elif isinstance(value, list) and step.lstrip("-").isdecimal():
        yield from _walk(value[int(step)], rest, holder)
    else:
        raise LookupError(f"{step!r} asked of a {type(value).__name__}")


def _choice(value: Any, holder: Mapping[str, Any]) -> Choice:
    # So vLLM answers, with a status of 200 and what it has come to, when it is told to stop.
    if holder.get("finish_reason") == "abort":
        raise PassingError(
            "The server broke off the answer (finish_reason is abort), as it does when it stops"
        )
    text = _text(value)
    message = holder.get("message")
    refusal = message.get("refusal") if isinstance(message, Mapping) else None
    if refusal:
        return Choice(text or _text(refusal), "refusal")
    return Choice(text, _FINISH_REASONS.get(holder.get("finish_reason"), "other") if holder else "stop")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and "text" in part for part in value):
        return "".join(str(part["text"]) for part in value)
    return json.dumps(value, ensure_ascii=False)


def read_answer(data: Mapping[str, Any], *, path: ResponsePath, model: str, requests: int) -> Answer:
    """Read a response.

    :param model: Named when the response names none.
    :param requests: How many requests this answer took.
    :raises LookupError: there is nothing at the path.
    :raises PassingError: the server broke off the answer.
    """
    usage = data.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    return Answer(
        choices=path.read(data),
        model=str(data.get("model") or model),
        usage=Usage(
            requests=requests,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        ),
    )
