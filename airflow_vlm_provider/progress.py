"""How far a task is: counted as rows are written, said in one line."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from airflow_vlm_provider.types import Outcome


class CountingReader(io.RawIOBase):
    """Passes a stream through and reports how many bytes were read from it."""

    def __init__(self, stream: BinaryIO, report: Callable[[int], None]) -> None:
        super().__init__()
        self._stream = stream
        self._report = report

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._report(len(data))
        return len(data)

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


class Progress:
    """Counts of one task over all its shards.

    :param shards: How many shards are to be done.
    :param total_bytes: Their size together, as stored; how much of it was read and written tells the time left.
    """

    def __init__(self, *, shards: int, total_bytes: int) -> None:
        self.shards = shards
        self.total_bytes = total_bytes
        self.shards_done = 0
        self.rows = 0
        self.rows_begun = 0
        self.failed = 0
        self.skipped = 0
        self._bytes_read = 0
        self._started = time.monotonic()

    def read(self, count: int) -> None:
        """Note that ``count`` more bytes of the shards were read."""
        self._bytes_read += count

    def begun(self) -> None:
        """Note that one more row was read."""
        self.rows_begun += 1

    def wrote(self, outcome: Outcome) -> None:
        """Note one row's end."""
        self.rows += 1
        self.failed += outcome.status == "failed"
        self.skipped += outcome.status == "skipped"

    def snapshot(self) -> dict[str, Any]:
        """The counts as JSON values, with ``rows_per_second`` and ``seconds_left`` (None while unknown)."""
        elapsed = time.monotonic() - self._started
        # Reading runs ahead of writing, and how many rows are still to be read, only their bytes tell.
        share = min(self._bytes_read / self.total_bytes, 1.0) if self.total_bytes else 0.0
        share *= self.rows / self.rows_begun if self.rows_begun else 0.0
        return {
            "shards_done": self.shards_done,
            "shards": self.shards,
            "rows": self.rows,
            "failed": self.failed,
            "skipped": self.skipped,
            "rows_per_second": round(self.rows / elapsed, 1) if elapsed > 0 else 0.0,
            "percent": round(100 * share, 1),
            "seconds_left": round(elapsed * (1 - share) / share) if share > 0 else None,
        }

    def line(self) -> str:
        """The counts as one line for a log."""
        now = self.snapshot()
        left = "unknown" if now["seconds_left"] is None else f"about {_duration(now['seconds_left'])}"
        return (
            f"{now['shards_done']} of {now['shards']} shards committed, {now['rows']:,} rows done "
            f"({now['failed']:,} failed, {now['skipped']:,} skipped), {now['rows_per_second']:,} rows/s, "
            f"{now['percent']} % done, time left: {left}"
        )


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
