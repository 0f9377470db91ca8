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
from functools import lru_cache
from typing import Any

from airflow_vlm_provider.ledger.canonical import canonical
from airflow_vlm_provider.types import Request

KEY_VERSION = 1
"""Part of every key: a change to how they are made must not find answers to other questions."""

_HEX_DIGITS = 32


class RequestKeys:
    """Makes the keys of one task's requests. Safe to use from several threads at once.

    :param engine: What decides an answer besides the request, as the engine's ``parameters()`` has it.
    :param media: How media are prepared before they are sent; not where they may lie.
    :raises TypeError: one of them is no JSON value.
    """

    def __init__(self, *, engine: Mapping[str, Any], media: Mapping[str, Any]) -> None:
        self._common = _digest({"version": KEY_VERSION, "engine": engine, "media": media})

    def of(self, request: Request, digests: Sequence[str]) -> str:
        """Return a request's key: 32 hexadecimal digits.

        :param digests: SHA-256 of each medium's source bytes, in hexadecimal, in the order of the request's parts.
        :raises ValueError: there are not as many of them as there are media.
        :raises TypeError: the schema or the sampling parameters are no JSON values.
        """
        parts: list[tuple[str, str]] = []
        left = iter(digests)
        for part in request.parts:
            if isinstance(part, str):
                parts.append(("text", part))
            elif (digest := next(left, None)) is not None:
                parts.append((part.kind, digest))
            else:
                raise ValueError(f"The request has more media than the {len(digests)} digests given.")
        if next(left, None) is not None:
            raise ValueError(f"The request has fewer media than the {len(digests)} digests given.")
        return _digest([self._common, _frame(request), parts])[:_HEX_DIGITS]


def _frame(request: Request) -> str:
    """Hash what seldom varies from one sample to the next."""
    frame = (request.system, request.schema, request.sampling, request.n)
    try:
        # The values themselves can't be looked up: they may be changed later, and 1 equals True. These bytes tell
        # apart whatever differs, and are made several times as fast as the canonical ones.
        packed = marshal.dumps(frame, 2)  # type: ignore[arg-type]
    except ValueError:  # another class of mapping
        return _digest(frame)
    return _digest_of_packed(packed)


@lru_cache(maxsize=64)
def _digest_of_packed(packed: bytes) -> str:
    return _digest(marshal.loads(packed))


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
