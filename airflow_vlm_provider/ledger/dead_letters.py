"""Dead letters: the samples that failed for their own sake, one JSON object a line.

Fields: ``row`` (place in the shard, from 0), ``line`` (in the file, from 1), ``media`` (the reference at fault, or
null), ``kind``, ``message``, ``attempts`` (how often the engine was asked), ``time`` (ISO 8601, UTC) and, for a
row that could not be parsed and so stands in no output, ``raw``: its text, so that nothing is lost.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from datetime import datetime, timezone

from airflow_vlm_provider.errors import SampleError, VLMError
from airflow_vlm_provider.ledger.manifest import Files, ledger_folder
from airflow_vlm_provider.types import Outcome

SPOOL_BYTES = 1024 * 1024


class DeadLetters:
    """Collects a shard's dead letters, on disk beyond a megabyte, until they are saved at its commit."""

    def __init__(self) -> None:
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - closed by close()
        self.count = 0

    def add(self, outcome: Outcome) -> None:
        """Record one failed outcome."""
        error, sample = outcome.error, outcome.sample
        assert isinstance(error, SampleError)
        record = {
            "row": sample.index,
            "line": sample.line,
            "media": error.media,
            "kind": error.kind,
            "message": error.message,
            "attempts": error.attempts,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if sample.row is None:
            record["raw"] = sample.raw.decode(errors="backslashreplace")
        # ASCII, so that lone surrogates out of a broken row cannot break the record of it.
        self._spool.write(json.dumps(record).encode() + b"\n")
        self.count += 1

    def save(self, files: Files, shard: str, step: str) -> str | None:
        """Write ``errors.jsonl`` and return its name under the destination; None when nothing failed.

        When nothing failed, what an earlier run left there (committed or not) is emptied.
        """
        name = f"{ledger_folder(shard, step)}/errors.jsonl"
        if not self.count:
            try:
                if not files.read(name, max_bytes=1):
                    return None
            except FileNotFoundError:
                return None
            except VLMError:  # larger than the one byte that was asked for
                pass
        self._spool.seek(0)
        with files.create(name) as stream:
            shutil.copyfileobj(self._spool, stream)
        return name if self.count else None

    def close(self) -> None:
        """Free what was not saved."""
        self._spool.close()
