"""Request keys: what an answer is found by, whoever asked for it and wherever.

A key is made of what decides an answer and of nothing else: the model with its default sampling, how media are
prepared, and the request itself, with media by the content of their source. So no name, path, MIME type, date or
endpoint is in it, nor the name of the step, nor the order in which somebody wrote a dict.

Two requests that differ in any of that have different keys (128 bits of SHA-256 over a canonical spelling in which
every text and medium has its own place). What JSON does not tell apart is the same: 1.0 and 1, a list and a tuple.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from airflow_vlm_provider.ledger.canonical import canonical
from airflow_vlm_provider.types import MediaRef, Request

KEY_VERSION = 1
"""Part of every key: a change to how they are made must not find answers to other questions."""

_HEX_DIGITS = 32


class RequestKeys:
    """Makes the keys of one task's requests. Safe to use from several threads at once.

    :param engine: What decides an answer besides the request, as the engine's ``parameters()`` has it.
    :param media: How media are prepared before they are sent; not where they may lie.
    :param video: What of that concerns videos alone.
    :raises TypeError: one of them is no JSON value.
    """

    def __init__(
        self, *, engine: Mapping[str, Any], media: Mapping[str, Any], video: Mapping[str, Any] | None = None
    ) -> None:
        self._common = _digest({"version": KEY_VERSION, "engine": engine, "media": media})
        self._video = dict(video or {})

    def of_probe(self, digest: str) -> str:
        """Return the key of a question about a video file itself, whichever model is asked about it otherwise.

        :param digest: SHA-256 of the file's bytes, in hexadecimal.
        """
        return _digest({"version": KEY_VERSION, "probe": digest, "video": self._video})[:_HEX_DIGITS]

    def of(self, request: Request, digests: Sequence[str]) -> str:
        """Return a request's key: 32 hexadecimal digits.

        :param digests: SHA-256 of each medium's source bytes, in hexadecimal, in the order of the request's parts.
        :raises ValueError: there are not as many of them as there are media.
        :raises TypeError: the schema or the sampling parameters are no JSON values.
        """
        parts: list[tuple[Any, ...]] = []
        left = iter(digests)
        for part in request.parts:
            if isinstance(part, str):
                parts.append(("text", part))
            elif (digest := next(left, None)) is None:
                raise ValueError(f"The request has more media than the {len(digests)} digests given.")
            elif isinstance(part, MediaRef) and part.frames is not None:
                parts.append((part.kind, digest, asdict(part.frames), self._video))
            else:
                parts.append((part.kind, digest))
        if next(left, None) is not None:
            raise ValueError(f"The request has fewer media than the {len(digests)} digests given.")
        return _digest([self._common, _frame(request), parts])[:_HEX_DIGITS]


def _frame(request: Request) -> str:
    """Hash what seldom varies from one sample to the next."""
    frame: tuple[Any, ...] = (request.system, request.schema, request.sampling, request.n)
    if request.completion is not None:
        frame += (request.completion,)
    try:
        # The values themselves can't be looked up: they may be changed later, and 1 equals True. These bytes tell
        # apart whatever differs, and are made several times as fast as the canonical ones.
        packed = marshal.dumps(frame, 2)
    except ValueError:  # another class of mapping
        return _digest(frame)
    return _digest_of_packed(packed)


@lru_cache(maxsize=64)
def _digest_of_packed(packed: bytes) -> str:
    return _digest(marshal.loads(packed))


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
