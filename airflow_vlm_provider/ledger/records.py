"""One answer as one line of the journal: a JSON object with a fixed beginning.

A line begins with exactly ``{"key":"<32 hex>","time":"<32 characters>",``, so that what lines are looked up and
compared by is found without parsing them. Then follow ``model``, ``usage`` (``requests``, ``prompt_tokens``,
``completion_tokens``) and ``choices``, each with ``text`` and ``finish_reason``; last, where the step has something
to keep beside the answer, ``note``: an object.

Every text survives. (Where Python keeps the two halves of a surrogate pair apart, which JSON cannot, they come back
as the one character that they are.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, get_args

from airflow_vlm_provider.types import Answer, Choice, FinishReason, Usage

_BEGINNING = re.compile(
    rb'\{"key":"([0-9a-f]{32})",'
    rb'"time":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}\+00:00)",'
)
# json.dumps() makes an encoder anew for every call that does not take its defaults.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_USAGE = tuple(Usage.__dataclass_fields__)
_FINISH_REASONS = frozenset(get_args(FinishReason))


def to_line(key: str, answer: Answer, *, time: datetime, note: Mapping[str, Any] | None = None) -> bytes:
    """Spell an answer as a line, without the line end.

    :param key: The request's key.
    :param time: When it came; with a time zone.
    :param note: What else is kept beside it, as JSON values.
    :raises ValueError: the key is none, or the time has no time zone.
    """
    if time.tzinfo is None:
        raise ValueError("The time of an answer needs a time zone.")
    record = {
        "key": key,
        "time": time.astimezone(timezone.utc).isoformat(timespec="microseconds"),
        "model": answer.model,
        "usage": {name: getattr(answer.usage, name) for name in _USAGE},
        "choices": [{"text": each.text, "finish_reason": each.finish_reason} for each in answer.choices],
    }
    if note:
        record["note"] = note
    try:
        line = _ENCODER.encode(record).encode()
    except UnicodeEncodeError:  # a surrogate, which UTF-8 has no bytes for
        line = json.dumps(record, separators=(",", ":")).encode()
    _begin(line)
    return line


def is_record(line: bytes) -> bool:
    """Tell whether a line begins as the journal's lines do."""
    return _BEGINNING.match(line) is not None


def key_of(line: bytes) -> str:
    """Return a line's key.

    :raises ValueError: the line does not begin as the journal's lines do.
    """
    _begin(line)
    return line[8:40].decode()


def newer(a: bytes, b: bytes) -> bytes:
    """Return the one of two lines with the same key that counts: the later, whichever way they are given.

    :raises ValueError: one of them does not begin as the journal's lines do.
    """
    return max(a, b, key=lambda line: (_begin(line)[2], line))


def answer_of(line: bytes) -> Answer:
    """Return a line's answer.

    :raises ValueError: the line is none of the journal's.
    """
    _begin(line)
    try:
        record = json.loads(line.decode())
        usage = record["usage"]
        return Answer(
            choices=tuple(_choice(each) for each in _checked(record["choices"], list)),
            model=_checked(record["model"], str),
            usage=Usage(**{name: _checked(usage[name], int) for name in _USAGE}),
            key=key_of(line),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _malformed(line) from error


def _choice(data: Any) -> Choice:
    if data["finish_reason"] not in _FINISH_REASONS:
        raise TypeError(data["finish_reason"])
    return Choice(text=_checked(data["text"], str), finish_reason=data["finish_reason"])


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(value)
    return value


def _begin(line: bytes) -> re.Match[bytes]:
    match = _BEGINNING.match(line)
    if match is None:
        raise _malformed(line)
    return match


def _malformed(line: bytes) -> ValueError:
    return ValueError(f"{line[:60]!r} (the beginning of {len(line)} bytes) is not a line of the journal.")
