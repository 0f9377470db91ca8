"""What one task knows of answers: those of its own shards, and those that other journals hold, by the request's key.

Invariants:

- A journal segment is read at most once by a task, when one of its answers is wanted for the first time; who wants
  another one meanwhile waits for the same read.
- What the task's own shards know counts before what others do. Of several answers to a key that were put, the
  newest counts; of several segments, the newest one's.
- What the key index names and is torn is reported once and passed over; what is gone was replaced since the index was
  read, and what there is in its journal now is read in its place. That storage can't be
  reached is an error: to go on would be to pay again.
- Answers are in temporary files. In memory are 20 bytes for each that the key indexes name, and 28 for each in the
  segments that were read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.ledger.key_value_file import KeyValueFile
from airflow_vlm_provider.ledger.manifest import Files
from airflow_vlm_provider.ledger.read_segments import ReadSegments
from airflow_vlm_provider.ledger.records import key_of, newer
from airflow_vlm_provider.ledger.segments import MAX_FILE_BYTES, TornSegmentError, iter_segment, read_segment

log = logging.getLogger(__name__)

# Which destination, and the segment's name below its root.
Segment = tuple[int, str]

# So many segments are read at once: each of them is in memory meanwhile.
READS = 8
# Larger ones are read twice, to check them first, and so need not be in memory with all their lines.
LARGE_BYTES = 2 * 1024 * 1024


class Answers:
    """What one task knows. It is ready once :meth:`open` has returned.

    :param destination: Where the task's own shards have their ledger.
    :param reuse: Further destinations whose answers count, the first one's before the second's.
    :param step: The step's name.
    :param in_thread: Runs what blocks, away from the event loop.
    """

    def __init__(
        self,
        *,
        destination: Files,
        reuse: Sequence[Files] = (),
        step: str,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._files = (destination, *reuse)
        self._indexes = tuple(KeyIndex(files, step=step) for files in self._files)
        self._in_thread = in_thread
        self._put = KeyValueFile(choose=newer)
        self._read = ReadSegments()
        self._reading: dict[Segment, asyncio.Task[None]] = {}
        self._reads = asyncio.Semaphore(READS)

    @property
    def index(self) -> KeyIndex:
        """The destination's key index, loaded: commits are added to it."""
        return self._indexes[0]

    async def open(self) -> None:
        """Load the key indexes. The destination's own is merged when it has too many files.

        :raises PermissionError: access to a destination is denied.
        :raises ConnectionError: a destination can't be reached.
        """
        loads = [self.index.merge, *(index.load for index in self._indexes[1:])]
        await asyncio.gather(*(self._in_thread(load) for load in loads))

    def put(self, lines: Iterable[bytes]) -> None:
        """Make answers known, given as lines of the journal. For any thread.

        :raises OSError: the temporary file that they are kept in can't be written.
        """
        self._put.put_many((bytes.fromhex(key_of(line)), line) for line in lines)

    def has(self, key: str) -> bool:
        """Whether :meth:`get` will most likely find an answer. For any thread; reads no segment."""
        wanted = bytes.fromhex(key)
        return self._put.get(wanted) is not None or any(
            segment not in self._read or self._read.get(segment, wanted) is not None
            for segment in self._segments(key)
        )

    async def get(self, key: str) -> bytes | None:
        """The journal's line that answers a key; None when no journal that counts is known to have one.

        :raises OSError: the segment that has it can't be read, though it is there.
        """
        wanted = bytes.fromhex(key)
        line = self._put.get(wanted)
        if line is None:
            for segment in self._segments(key):
                if segment not in self._read:
                    await self._read_once(segment)
                if (line := self._read.get(segment, wanted)) is not None:
                    break
        return line

    def known(self) -> int:
        """How many answers are at hand without another read."""
        return len(self._put) + len(self._read)

    async def close(self) -> None:
        """Stop reading and free everything."""
        tasks = list(self._reading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._put.close()
        self._read.close()

    def _segments(self, key: str) -> Iterator[Segment]:
        """The segments that may hold a key, the most promising first."""
        for place, index in enumerate(self._indexes):
            for name in index.find(key):
                yield place, name

    async def _read_once(self, segment: Segment) -> None:
        task = self._reading.get(segment)
        if task is None:
            task = self._reading[segment] = asyncio.create_task(self._read_segment(segment))
            task.add_done_callback(_seen)
        # Shielded: who waits may be cancelled, and others wait for the same.
        await asyncio.shield(task)

    async def _read_segment(self, segment: Segment) -> None:
        try:
            async with self._reads:
                await self._in_thread(lambda: self._add(segment))
        finally:
            del self._reading[segment]

    def _add(self, segment: Segment) -> None:
        place, name = segment
        files = self._files[place]
        uri = getattr(files, "uri", "") + name
        try:
            data = files.read(name, max_bytes=MAX_FILE_BYTES)
            large = len(data) > LARGE_BYTES
            self._read.add(segment, iter_segment(data) if large else (read_segment(data),))
        except TornSegmentError as error:
            log.warning("%s is left out: %s Answers that only it holds are asked for again.", uri, error)
            self._read.add(segment, ())
        except OSError as error:
            if not _is_gone(error):
                raise
            log.info("%s, which the index of answers names, is gone; its journal is read instead.", uri)
            self._read.add(segment, _journal(files, name.rpartition("/")[0]))


def _journal(files: Files, folder: str) -> Iterator[list[bytes]]:
    """Yield the lines of all segments in a journal's folder, from the oldest to the newest."""
    for info in sorted(files.list(folder), key=lambda info: info.name):
        try:
            yield read_segment(files.read(info.name, max_bytes=MAX_FILE_BYTES))
        except TornSegmentError:
            continue
        except OSError as error:
            if not _is_gone(error):
                raise


def _is_gone(error: OSError) -> bool:
    # Of the package's own errors, that which is an OSError too says that it went while it was read. All others are the
    # storage's, and to go on would be to pay again.
    return isinstance(error, FileNotFoundError | VLMError)


def _seen(task: asyncio.Task[None]) -> None:
    """Look at a read's error, which nobody else does when all who waited for it were cancelled."""
    if not task.cancelled():
        task.exception()
