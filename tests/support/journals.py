"""A shard's journal, run as a task runs it, and what the next one finds of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from airflow_vlm_provider.ledger.journal import FlushPolicy, ShardJournal
from airflow_vlm_provider.ledger.manifest import Counts, Manifest, save_manifest
from airflow_vlm_provider.ledger.records import to_line
from airflow_vlm_provider.ledger.write_behind import Window
from airflow_vlm_provider.types import Answer, Choice
from tests.support.memory_files import MemoryFiles

SHARD, STEP = "in/a.jsonl", "caption"
FOLDER = f"_vlm/{SHARD}/{STEP}"
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def record(number: int, tick: int = 0, text: str = "a cat") -> bytes:
    return to_line(key(number), Answer((Choice(text),), "m"), time=NOON + timedelta(seconds=tick))


def records(count: int) -> list[bytes]:
    return [record(number) for number in range(count)]


async def inline(function: Callable[[], Any]) -> Any:
    await asyncio.sleep(0)
    return function()


def journal(files: Any, **options: Any) -> ShardJournal:
    given: dict[str, Any] = {
        "policy": FlushPolicy(),
        "written_by": {"dag_id": "d"},
        "in_thread": inline,
        "on_failure": lambda error: None,
        **options,
    }
    window = Window(given.pop("policy"))
    return ShardJournal(files, shard=SHARD, step=STEP, window=window, **given)


async def loaded(files: Any, **options: Any) -> tuple[ShardJournal, list[bytes]]:
    made, lines = journal(files, **options), []
    await made.load(lines.extend)
    return made, lines


def stored(files: Any) -> list[bytes]:
    """What whoever comes next finds, without order."""

    async def go() -> list[bytes]:
        made, lines = await loaded(files)
        await made.close()
        return sorted(lines)

    return list(asyncio.run(go()))


def commit_manifest(files: Any, segments_named: list[str]) -> None:
    manifest = Manifest(
        counts=Counts(),
        model="m",
        fingerprint="f",
        input={},
        output={},
        errors=None,
        started_at="",
        finished_at="",
        provider_version="",
        journal=segments_named,
    )
    save_manifest(files, SHARD, STEP, manifest)


async def commit(made: ShardJournal, files: Any) -> list[str]:
    """As the end of a shard's run does."""
    await made.flush()
    kept = made.consolidate()
    commit_manifest(files, kept)
    made.retire()
    await made.close()
    return kept


def written(files: Any, lines: list[bytes], *, answers: int = 512, committed: bool = True) -> list[str]:
    """What an earlier run left behind."""

    async def go() -> list[str]:
        made = journal(files, policy=FlushPolicy(answers=answers))
        for line in lines:
            await made.append(line)
        if committed:
            return await commit(made, files)
        await made.flush()
        await made.close()
        return []

    return list(asyncio.run(go()))


async def reuse(files: Any, lines: list[bytes], new: list[bytes] | None = None) -> list[str]:
    """What a later run does that has a use for some answers and asks for others."""
    made, _ = await loaded(files)
    for line in lines:
        made.use(line)
    for line in new or []:
        await made.append(line)
    return await commit(made, files)


def names(files: MemoryFiles) -> list[str]:
    """The files in the journal, as manifests name them."""
    return [
        name.removeprefix(f"{FOLDER}/")
        for name in sorted(files.files)
        if name.startswith(f"{FOLDER}/journal/")
    ]
