"""What became of shards, read from the ledger for people: commits, journal segments, dead letters.

Nothing here decides anything, so what can't be read is said and does not stop the rest.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.dead_letters import load_dead_letters
from airflow_vlm_provider.ledger.manifest import MAX_MANIFEST_BYTES, FileInfo, Files, Manifest, ledger_folder
from airflow_vlm_provider.ledger.segments import (
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    TornSegmentError,
    is_segment,
    iter_segment,
)
from airflow_vlm_provider.ledger.tree import LedgerFile, Place, walk

THREADS = 16
# Shards whose manifests are read at the same time.
BATCH_SHARDS = 256


@dataclass(frozen=True, slots=True)
class Commit:
    """A shard's last commit under one step, as far as it can be read.

    :param manifest: None when there is none, or it can't be read.
    :param problem: Why there is none, in a few words; None when there is one.
    :param segments: How many journal segments the shard has.
    :param journal_size: Bytes of these.
    """

    place: Place
    manifest: Manifest | None
    problem: str | None
    segments: int
    journal_size: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A journal segment.

    :param name: Below the shard's ledger folder.
    :param size: Bytes.
    :param modified: When it was written, in seconds since 1970; 0.0 where the storage does not say.
    :param referred: Whether the manifest refers to it.
    :param header: What the segment says of itself: who wrote it, and so on.
    :param answers: How many it holds; None when it can't be read.
    :param problem: Why it can't be read, in a few words; None when it can.
    """

    name: str
    size: int
    modified: float
    referred: bool
    header: Mapping[str, Any]
    answers: int | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class History:
    """All that there is of a shard under one step.

    :param segments: By name, and so by the time at which they were written.
    :param kinds: How many dead letters there are of each kind.
    :param letters: The first of them.
    """

    commit: Commit
    segments: tuple[Segment, ...]
    kinds: Mapping[str, int]
    letters: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A shard's files under one step, as they were listed."""

    place: Place
    segments: list[LedgerFile] = field(default_factory=list)


def overview(files: Files) -> Iterator[Commit]:
    """Yield the last commit of every shard and step below a destination, by name; also where there is none yet.

    :raises ConnectionError, PermissionError, VLMError: the destination can't be listed.
    """
    shards = _grouped(walk(files))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="vlm-history") as threads:
        while batch := list(itertools.islice(shards, BATCH_SHARDS)):
            yield from threads.map(lambda each: _commit(files, each), batch)


def histories(files: Files, shard: str, *, letters: int) -> list[History]:
    """Read all that there is of one shard, by step; an empty list when there is nothing.

    :param letters: How many dead letters to return of each step.
    :raises ConnectionError, PermissionError, VLMError: the shard's ledger can't be listed, or its dead letters can't be
        read.
    """
    return [_history(files, each, letters) for each in _grouped(walk(files, shard))]


def _grouped(found: Iterable[LedgerFile]) -> Iterator[_Listed]:
    for place, group in itertools.groupby(found, key=lambda each: each.place):
        yield _Listed(place, [each for each in group if is_segment(each.file)])


def _commit(files: Files, listed: _Listed) -> Commit:
    manifest, problem = None, None
    try:
        name = f"{ledger_folder(*listed.place)}/manifest.json"
        manifest = Manifest.from_json(json.loads(files.read(name, max_bytes=MAX_MANIFEST_BYTES)))
    except FileNotFoundError:
        problem = "never committed"
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        problem = f"the manifest is damaged: {error!r}"
    except (VLMError, OSError) as error:
        problem = f"the manifest can't be read: {error}"
    size = sum(each.info.size for each in listed.segments)
    return Commit(listed.place, manifest, problem, len(listed.segments), size)


def _history(files: Files, listed: _Listed, letters: int) -> History:
    commit = _commit(files, listed)
    referred = frozenset(commit.manifest.journal) if commit.manifest is not None else frozenset()
    dead = load_dead_letters(files, *listed.place)
    return History(
        commit=commit,
        segments=tuple(
            _segment(files, each.file, each.info, referred=each.file in referred) for each in listed.segments
        ),
        kinds=dict(Counter(each["kind"] for each in dead).most_common()),
        letters=tuple(dead[:letters]),
    )


def _segment(files: Files, name: str, info: FileInfo, *, referred: bool) -> Segment:
    header: Mapping[str, Any] = {}
    answers, problem = None, None
    try:
        data = files.read(info.name, max_bytes=MAX_FILE_BYTES)
        answers = sum(len(lines) for lines in iter_segment(data))
        header = _header(data)
    except TornSegmentError as error:
        problem = f"torn: {error}"
    except (VLMError, OSError) as error:
        problem = f"can't be read: {error}"
    return Segment(name, info.size, info.modified, referred, header, answers, problem)


def _header(data: bytes) -> Mapping[str, Any]:
    """The first line of a segment that is known to be whole."""
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        line = io.BufferedReader(reader).readline(MAX_LINE_BYTES)
    header: Mapping[str, Any] = json.loads(line)
    return header
