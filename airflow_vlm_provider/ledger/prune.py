"""Clears away what nothing refers to any more: old plans, and journal segments that no commit's output is made from.

Those are of attempts that never committed, or hold answers to questions that are not asked any more. Only what is
known to be unneeded goes: a segment that has the name of one, that no manifest refers to, and that is old by the
storage's own clock. A manifest that can't be read may refer to anything, so that shard is left as
it is.

A run may commit at the same time. Each shard's manifest is read right before its segments are deleted, not when they
were listed, and whoever looks for an answer in a segment that is gone asks again: a race costs a request at most, and
never an output.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.ledger.manifest import MAX_MANIFEST_BYTES, FileInfo, Files, ledger_folder
from airflow_vlm_provider.ledger.plans import PLANS_FOLDER
from airflow_vlm_provider.ledger.segments import is_segment
from airflow_vlm_provider.ledger.tree import LEDGER_FOLDER, Place, walk

THREADS = 16
# Shards whose segments are held in memory at once; their manifests are read at the same time.
BATCH_SHARDS = 256
DAY_SECONDS = 86400


@dataclass(frozen=True, slots=True)
class Removed:
    """What went of one shard under one step, or would go."""

    place: Place
    segments: tuple[str, ...]
    size: int


@dataclass(slots=True)
class Pruned:
    """What a pruning did, or would do.

    :param removed: By shard and step; only those of which something goes.
    :param plans: Names of the plans.
    :param plans_size: Bytes of the plans.
    :param kept: Why shards were left as they are though they have old segments: one sentence each.
    """

    removed: list[Removed] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    plans_size: int = 0
    kept: list[str] = field(default_factory=list)

    @property
    def segments(self) -> int:
        """How many segments."""
        return sum(len(each.segments) for each in self.removed)

    @property
    def size(self) -> int:
        """Bytes of the segments."""
        return sum(each.size for each in self.removed)


def prune(files: Files, *, older_than_days: float, dry_run: bool = False) -> Pruned:
    """Remove the journal segments that no manifest refers to, and the plans, that are older than so many days.

    Runs that are not committed yet have segments that no manifest refers to: choose an age that no run reaches.

    :param files: A destination.
    :param dry_run: Only tell what would go. Ages are then told by this machine's clock, because nothing is written.
    :raises ConnectionError, PermissionError, VLMError: the destination can't be listed or written.
    """
    now = time.time() if dry_run else _storage_time(files)
    oldest = now - older_than_days * DAY_SECONDS
    pruned = Pruned()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="vlm-prune") as threads:
        shards = _with_old_segments(files, oldest)
        while batch := list(itertools.islice(shards, BATCH_SHARDS)):
            for ended in threads.map(lambda each: _prune_shard(files, *each, dry_run=dry_run), batch):
                if isinstance(ended, str):
                    pruned.kept.append(ended)
                elif ended.segments:
                    pruned.removed.append(ended)
    if not dry_run:
        for step in sorted({each.place.step for each in pruned.removed}):
            gone = [name for each in pruned.removed if each.place.step == step for name in each.segments]
            KeyIndex(files, step=step).merge(gone=gone)
    for plan in files.list(PLANS_FOLDER):
        if _is_older(plan, oldest):
            if not dry_run:
                files.delete(plan.name)
            pruned.plans.append(plan.name)
            pruned.plans_size += plan.size
    return pruned


def _storage_time(files: Files) -> float:
    """What time it is by the clock that the files' ages are told by."""
    folder = f"{LEDGER_FOLDER}/_clock"
    name = f"{folder}/{uuid.uuid4().hex}"
    with files.create(name):
        pass
    try:
        return next((each.modified for each in files.list(folder) if each.name == name), 0.0)
    finally:
        files.delete(name)


def _with_old_segments(files: Files, oldest: float) -> Iterator[tuple[Place, list[FileInfo]]]:
    """Shards with the segments of theirs that are old enough to go if nothing refers to them."""
    for place, group in itertools.groupby(walk(files), key=lambda each: each.place):
        old = [each.info for each in group if is_segment(each.file) and _is_older(each.info, oldest)]
        if old:
            yield place, old


def _is_older(info: FileInfo, oldest: float) -> bool:
    # Storage that does not say when a file was written says 0.
    return 0.0 < info.modified < oldest


def _prune_shard(files: Files, place: Place, old: Sequence[FileInfo], *, dry_run: bool) -> Removed | str:
    """Delete those of a shard's old segments that its manifest does not refer to; or say why none was."""
    try:
        needed = _needed(files, place)
    except (VLMError, OSError, ValueError) as error:
        return f"{place.shard} ({place.step}) is left as it is: it can't be told what its manifest refers to. {error}"
    unneeded = [info for info in old if info.name not in needed]
    if not dry_run:
        for info in unneeded:
            files.delete(info.name)
    return Removed(place, tuple(info.name for info in unneeded), sum(info.size for info in unneeded))


def _needed(files: Files, place: Place) -> frozenset[str]:
    """The segments that a shard's manifest refers to now.

    :raises ValueError: what is there is no manifest, or it names a segment that is not there.
    """
    folder = ledger_folder(*place)
    try:
        data = json.loads(files.read(f"{folder}/manifest.json", max_bytes=MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return frozenset()
    journal = data.get("journal") if isinstance(data, dict) else None
    if not isinstance(journal, list) or not all(isinstance(each, str) for each in journal):
        raise ValueError("It has no list of journal segments.")
    needed = frozenset(f"{folder}/{each}" for each in journal)
    # Of two attempts that were alive at once, the first may have committed after the second had put everything into a
    # segment of its own: the answers are all there, but not where the manifest says.
    if missing := needed - {each.name for each in files.list(f"{folder}/journal")}:
        raise ValueError(
            f"It names {min(missing)}, which is not there; another segment may have its answers."
        )
    return needed
