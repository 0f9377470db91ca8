"""What journal and manifests cost is seen by taking them out: stand-ins that do nothing in their places.

The package has no switch for this, and needs none: nobody should run it so. What is taken out is all that exists for
the ledger's sake: digests of media, request keys, lines of the journal, what is known of answers, segments, both
indexes, the record of media, and the manifest. What stays is what a run without a ledger would have to do, too:
load, ask, parse, write in order, count, and keep dead letters.
"""

# Stand-ins take what the real ones take.
# ruff: noqa: ARG001, ARG002, ARG005
from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock


class NoJournal:
    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    async def load(self, take: Any) -> None: ...

    async def append(self, line: bytes) -> None: ...

    def use(self, line: bytes) -> None: ...

    async def flush(self) -> None: ...

    def consolidate(self) -> list[str]:
        return []

    def retire(self) -> None: ...

    async def close(self) -> None: ...


class NoIndex:
    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def add(self, *entries: Any) -> None: ...


class NoRecorder:
    def __init__(self, parameters: Any) -> None: ...

    def add(self, *medium: Any, **options: Any) -> None: ...

    def save(self, *place: Any) -> None: ...

    def close(self) -> None: ...


class NoAnswers:
    def __init__(self, **options: Any) -> None:
        self.index = NoIndex()

    async def open(self) -> None: ...

    def put(self, lines: Any) -> None: ...

    def has(self, key: str) -> bool:
        return False

    async def get(self, key: str) -> None: ...

    async def close(self) -> None: ...


class NoKeys:
    """Keys that no two requests share, because identical ones in flight would be sent once."""

    def __init__(self, **options: Any) -> None:
        self._numbers = itertools.count()

    def of(self, request: Any, digests: Any) -> str:
        return str(next(self._numbers))


def no_line(key: str, answer: Any, *, time: Any, note: Any) -> bytes:
    return b""


def no_digest(data: bytes) -> Any:
    return SimpleNamespace(hexdigest=str)


@contextmanager
def without_ledger() -> Iterator[None]:
    """Tasks that run inside the block keep no journal and commit nothing.

    :raises AttributeError: the package's rooms have changed, and the stand-ins don't fit them any more.
    """
    from airflow_vlm_provider import answering, runner, shard_ledger
    from airflow_vlm_provider.shards import media

    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (shard_ledger, "ShardJournal", NoJournal),
        (shard_ledger, "MediaRecorder", NoRecorder),
        (shard_ledger, "save_manifest", lambda *manifest: None),
        (runner, "Answers", NoAnswers),
        (runner, "CommitIndex", NoIndex),
        (runner, "RequestKeys", NoKeys),
        (answering, "to_line", no_line),
        (media, "hashlib", SimpleNamespace(sha256=no_digest)),
    )
    with ExitStack() as patches:
        for module, name, stand_in in stand_ins:
            patches.enter_context(mock.patch.object(module, name, stand_in))
        yield
