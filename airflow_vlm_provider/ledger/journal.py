"""The journal of one shard under one step, during one attempt at it: every answer that was paid for.

Invariants:

- What was appended and not flushed yet is bounded (see :class:`~airflow_vlm_provider.ledger.write_behind.FlushPolicy`):
  a process that is killed loses at most that, and what was being answered.
- A segment is written whole under a name of its own, so attempts that are alive at the same time never touch each
  other's. Only after a commit are segments deleted, and only those of which every answer is in the commit's too.
- What can't be read is left out and told, never fatal: its answers are asked for again, nothing else.

What is kept in memory of each line is 24 bytes, to know which segment has it; the lines themselves are on disk.

All methods belong to the event loop's thread, except :meth:`~ShardJournal.consolidate`,
:meth:`~ShardJournal.consolidated_keys` and :meth:`~ShardJournal.retire`, which block and belong into a thread, one
after another, when nothing is appended any more.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from array import array
from binascii import hexlify, unhexlify
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from airflow_vlm_provider import __version__
from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.manifest import Files, ledger_folder, load_manifest
from airflow_vlm_provider.ledger.segments import (
    MAX_FILE_BYTES,
    SegmentWriter,
    TornSegmentError,
    is_segment,
    iter_segment,
    segment_name,
)
from airflow_vlm_provider.ledger.write_behind import FlushPolicy, InThread, Window, WriteBehind

__all__ = ["FlushPolicy", "ShardJournal"]

log = logging.getLogger(__name__)

READERS = 4
# How often the journal is listed when segments vanish before they are read, and how long to wait in between: a
# listing may be older than what it lists.
LISTINGS = 5
LISTING_PAUSE_SECONDS = 0.1
# Lines that are remembered so as not to collect them twice. Twice is once too often, and no harm.
RECENT_LINES = 8192
CLOSE_SECONDS = 2.0
_KEY_BYTES = 16


class ShardJournal:
    """The answers of one shard.

    :param files: Where the ledger is.
    :param shard: Name of the shard.
    :param step: Name of the step.
    :param window: When answers are written, and how many may wait for it; shared by all journals of a task.
    :param written_by: Who runs this; stands in each segment.
    :param in_thread: Runs what blocks.
    :param on_failure: Called once, in the event loop, when answers can't be saved: no more should be paid for.
    """

    def __init__(
        self,
        files: Files,
        *,
        shard: str,
        step: str,
        window: Window,
        written_by: Mapping[str, Any],
        in_thread: InThread,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._files = files
        self._shard = shard
        self._step = step
        self._folder = ledger_folder(shard, step)
        self._written_by = dict(written_by)
        self._in_thread = in_thread
        self._writer_id = secrets.token_hex(4)
        self._segments = 0
        # What is known of the segments that are there, by name: those that were loaded and those written since.
        self._held: dict[str, _Contents] = {}
        self._unsaved = WriteBehind(self._write, window=window, in_thread=in_thread, on_failure=on_failure)
        # What the consolidated segment is to hold; several only where it would be too large to be read.
        self._collected: list[tuple[SegmentWriter, _Contents]] = []
        self._recent: set[int] = set()
        self._kept: dict[str, _Contents] | None = None
        self.torn: list[str] = []
        """Segments that can't be read, by their names below the shard's ledger folder."""

    async def load(self, take: Callable[[list[bytes]], None]) -> None:
        """Read what earlier attempts, or another that is still alive, have saved.

        :param take: Takes lines; it is called in threads, by several at once.
        """
        for listing in range(LISTINGS):
            sizes = await self._in_thread(self._list)
            names = [name for name in sizes if name not in self._held and name not in self.torn]
            gate = asyncio.Semaphore(READERS)
            tasks = [asyncio.ensure_future(self._load_one(name, sizes[name], take, gate)) for name in names]
            try:
                there = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            if all(there):
                return
            # Another attempt has put their answers into a segment of its own.
            await asyncio.sleep(LISTING_PAUSE_SECONDS * listing)
        log.warning(
            "Segments of the journal in %s were listed and not there, %d times in a row. Answers in them, if there "
            "are any, are asked for again.",
            self._folder,
            LISTINGS,
        )

    async def append(self, line: bytes) -> None:
        """Save an answer that was paid for just now.

        Returns at once, unless too many are not durable yet: then when there is room again. Whatever happens, also
        when this is cancelled or raises what the store said, the line is kept to be saved.

        :raises ValueError: it is no line of a journal.
        :raises Exception: answers can't be saved; what the store said.
        """
        self._collect(line)
        await self._unsaved.append(line)

    def use(self, line: bytes) -> None:
        """Note that an answer was used that is durable already, wherever: the shard's own journal is to have it.

        Of several lines with the same key it must be the one that counts.

        :raises ValueError: it is no line of a journal.
        """
        self._collect(line)

    async def flush(self) -> None:
        """Make everything durable that was appended.

        :raises Exception: answers can't be saved; what the store said.
        """
        await self._unsaved.flush()

    def consolidate(self) -> list[str]:
        """Have one segment with every answer that was appended or used; several where one would be too large.

        Nothing is written where one is there already. Comes after :meth:`flush`.

        :return: Names below the shard's ledger folder; empty when no answer was needed.
        """
        if self._kept is None:
            self._kept = self._find_whole() or self._write_whole()
        return list(self._kept)

    def consolidated_keys(self, segment: str | None = None) -> Iterator[str]:
        """Yield the keys of all answers in what :meth:`consolidate` returned, or in one of the segments."""
        kept = self._kept or {}
        for contents in kept.values() if segment is None else [kept[segment]]:
            for key in contents.each_key():
                yield hexlify(key).decode()

    def retire(self) -> None:
        """Delete the segments that the consolidated one replaces. Comes after the commit.

        A segment stays that has any answer that this run made no use of, because it was paid for too; so do those
        that the manifest names by now. Failing to delete is told and no error: what stays is only in the way.
        """
        if self._kept is None:
            raise RuntimeError("retire() comes after consolidate().")
        used = {key for _, contents in self._collected for key in contents.each_key()}
        unneeded = [
            name
            for name, contents in self._held.items()
            if name not in self._kept and all(key in used for key in contents.each_key())
        ]
        if not unneeded:
            return
        try:
            # Another attempt may have committed since; what its manifest names is the shard's.
            manifest = load_manifest(self._files, self._shard, self._step)
            named = frozenset(() if manifest is None else manifest.journal)
            for name in sorted(unneeded):
                if name not in named:
                    self._files.delete(f"{self._folder}/{name}")
                    del self._held[name]
        except (OSError, VLMError) as error:
            log.warning(
                "Segments in %s that are not needed any more could not be deleted: %s", self._folder, error
            )

    async def close(self, *, seconds: float = CLOSE_SECONDS) -> None:
        """Save what was not saved yet, if that can be done in so many seconds, and free everything. Never fails."""
        try:
            if reason := await self._unsaved.close(seconds=seconds):
                log.warning(
                    "%d answers in %s may not be saved (%s); they are asked for again.",
                    self._unsaved.waiting,
                    self._folder,
                    reason,
                )
        finally:
            for writer, _ in self._collected:
                writer.close()

    def _collect(self, line: bytes) -> None:
        """Take a line for the consolidated segment."""
        mark = hash(line)
        if mark in self._recent:
            return
        if not self._collected or self._collected[-1][0].full:
            self._collected.append((SegmentWriter(self._header()), _Contents()))
        writer, contents = self._collected[-1]
        writer.add(line)
        contents.add(line)
        if len(self._recent) >= RECENT_LINES:
            self._recent.clear()
        self._recent.add(mark)

    def _write(self, lines: Sequence[bytes]) -> None:
        writer, contents, name = SegmentWriter(self._header()), _Contents(), self._next_name()
        try:
            for line in lines:
                writer.add(line)
                contents.add(line)
            writer.save(self._files, f"{self._folder}/{name}")
        finally:
            writer.close()
        self._held[name] = contents

    def _list(self) -> dict[str, int]:
        """The segments that are there, by name below the ledger folder, with their sizes."""
        prefix = f"{self._folder}/"
        listed = {
            info.name.removeprefix(prefix): info.size for info in self._files.list(f"{self._folder}/journal")
        }
        return {name: size for name, size in listed.items() if is_segment(name)}

    async def _load_one(
        self, name: str, size: int, take: Callable[[list[bytes]], None], gate: asyncio.Semaphore
    ) -> bool:
        """Load a segment; False when it is not there any more."""
        async with gate:
            try:
                self._held[name] = await self._in_thread(lambda: self._read(name, size, take))
            except TornSegmentError as error:
                self.torn.append(name)
                log.warning(
                    "%s/%s is left out, and what it answered is asked for again. %s",
                    self._folder,
                    name,
                    error,
                )
            except FileNotFoundError:
                return False
            except OSError as error:
                # Of the package's own errors, that which is an OSError too says that it went while it was read.
                if not isinstance(error, VLMError):
                    raise
                return False
        return True

    def _read(self, name: str, size: int, take: Callable[[list[bytes]], None]) -> _Contents:
        if size > MAX_FILE_BYTES:
            raise TornSegmentError(f"It has {size} bytes, which no segment has.")
        data = self._files.read(f"{self._folder}/{name}", max_bytes=MAX_FILE_BYTES)
        contents = _Contents()
        for lines in iter_segment(data):
            for line in lines:
                contents.add(line)
            take(lines)
        return contents

    def _find_whole(self) -> dict[str, _Contents]:
        """A segment that has all that was collected, if there is one."""
        wanted = {line for _, contents in self._collected for line in contents.lines}
        if not wanted:
            return {}
        whole = [
            name
            for name, contents in self._held.items()
            if len(contents.lines) >= len(wanted) and not wanted.difference(contents.lines)
        ]
        if not whole:
            return {}
        # Another attempt may have replaced it since.
        there = self._list()
        return next(({name: self._held[name]} for name in whole if name in there), {})

    def _write_whole(self) -> dict[str, _Contents]:
        kept = {}
        for writer, contents in self._collected:
            name = self._next_name(consolidated=True)
            writer.save(self._files, f"{self._folder}/{name}")
            kept[name] = contents
        return kept

    def _next_name(self, *, consolidated: bool = False) -> str:
        self._segments += 1
        return segment_name(
            datetime.now(timezone.utc), self._writer_id, self._segments, consolidated=consolidated
        )

    def _header(self) -> dict[str, Any]:
        return {
            "shard": self._shard,
            "step": self._step,
            "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            "provider_version": __version__,
            "written_by": self._written_by,
        }


class _Contents:
    """Which lines a segment has, without the lines."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self.lines = array("q")

    def add(self, line: bytes) -> None:
        self._keys += unhexlify(line[8:40])
        self.lines.append(hash(line))

    def each_key(self) -> Iterator[bytes]:
        for start in range(0, len(self._keys), _KEY_BYTES):
            yield bytes(self._keys[start : start + _KEY_BYTES])
