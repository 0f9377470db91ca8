"""Dead letters: the samples that failed for their own sake, one JSON object a line.

Fields: ``id`` (names the sample by its content, see :func:`sample_id`), ``row`` (place in the shard, from 0),
``line`` (in the file, from 1), ``media`` (the reference at fault, or null), ``kind``, ``message``, ``attempts`` (how
often the engine was asked in vain, over all runs), ``first`` and ``last`` (ISO 8601, UTC: when the sample was first
and last seen to fail), ``keys`` (request keys of what was asked for the sample) and, for a row that could not be
parsed and so stands in no output, ``raw``: its text, so that nothing is lost.

A sample keeps its history from run to run for as long as it fails, wherever in the shard it stands: rows that were
inserted above it change nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from airflow_vlm_provider.errors import SampleError, VLMError
from airflow_vlm_provider.ledger.manifest import Files, ledger_folder
from airflow_vlm_provider.types import Outcome, Sample

log = logging.getLogger(__name__)

SPOOL_BYTES = 1024 * 1024
# What is read back at most. A letter has some hundred bytes: this is for well over a hundred thousand of them.
MAX_ERRORS_BYTES = 64 * 1024 * 1024
MAX_LETTER_BYTES = 16 * 1024 * 1024
_TEXTS = ("id", "kind", "message", "first", "last")


class NotTriedAgainError(SampleError):
    """The sample failed before, and this run left it alone: its dead letter stays as it is.

    :param letter: The sample's dead letter, as :func:`load_dead_letters` returns it.
    """

    def __init__(self, letter: Mapping[str, Any]) -> None:
        super().__init__(letter["kind"], letter["message"], media=letter.get("media"))
        self.letter = letter


class DeadLetters:
    """Collects a shard's dead letters, on disk beyond a megabyte, until they are saved at its commit.

    :param previous: The shard's dead letters so far, as :func:`load_dead_letters` returns them: what fails again
        keeps its ``first`` and adds to its ``attempts``.
    :param in_place: The shard is the very one that these are of, so that its rows stand where they stood. Otherwise a
        row may have moved, and of several that are the same in everything it is not known which one failed.
    """

    def __init__(
        self, previous: Iterable[Mapping[str, Any]] | None = None, *, in_place: bool = False
    ) -> None:
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - closed by close()
        self._in_place = in_place
        self._earlier: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for letter in previous or ():
            self._earlier[letter["id"]].append(letter)
        self.kinds: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many samples failed."""
        return self.kinds.total()

    def earlier(self, sample: Sample) -> Mapping[str, Any] | None:
        """The dead letter that an earlier run left of a sample; None when it did not fail then."""
        # Most shards have none, and then no row is worth hashing.
        letters = self._earlier.get(sample_id(sample)) if self._earlier else None
        if not letters:
            return None
        for letter in letters:
            if letter["row"] == sample.index:
                return letter
        return None if self._in_place else letters[0]

    def add(self, outcome: Outcome, keys: Sequence[str] = ()) -> None:
        """Record one failed outcome, once.

        :param keys: Request keys of what was asked for the sample.
        """
        error, sample = outcome.error, outcome.sample
        assert isinstance(error, SampleError)
        before = error.letter if isinstance(error, NotTriedAgainError) else self.earlier(sample)
        identity = sample_id(sample)
        if before is not None and before in self._earlier[identity]:
            self._earlier[identity].remove(before)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        # An answer that a journal had is not asked for: a sample that can't be parsed costs nothing the second time.
        asked = min(error.attempts, outcome.usage.requests)
        record: dict[str, Any] = {
            "id": identity,
            "row": sample.index,
            "line": sample.line,
            "media": error.media,
            "kind": error.kind,
            "message": error.message,
            "attempts": asked + (before["attempts"] if before else 0),
            "first": before["first"] if before else now,
            "last": now,
            "keys": list(dict.fromkeys(keys)),
        }
        if isinstance(error, NotTriedAgainError):
            record |= {name: error.letter[name] for name in ("last", "keys")}
        if sample.row is None:
            record["raw"] = sample.raw.decode(errors="backslashreplace")
        # ASCII, so that lone surrogates out of a broken row cannot break the record of it.
        self._spool.write(json.dumps(record).encode() + b"\n")
        self.kinds[error.kind] += 1

    def save(self, files: Files, shard: str, step: str) -> str | None:
        """Write ``errors.jsonl`` and return its name under the destination; None when nothing failed.

        When nothing failed, what an earlier run left there (committed or not) is emptied.
        """
        name = errors_name(shard, step)
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


def sample_id(sample: Sample) -> str:
    """Name a sample by its content: 16 hexadecimal digits of the SHA-256 of its bytes, or of its fields and key.

    Where it stands is not in it. Samples that are the same in everything have the same name.
    """
    content = sample.raw
    if not content:
        fields = [sample.key, sample.error if sample.row is None else sample.row]
        content = json.dumps(fields, sort_keys=True, default=repr).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def errors_name(shard: str, step: str) -> str:
    """The name of a shard's dead letters under the destination."""
    return f"{ledger_folder(shard, step)}/errors.jsonl"


def load_dead_letters(files: Files, shard: str, step: str) -> list[dict[str, Any]]:
    """Read a shard's dead letters, in the order of its rows; what is not readable as one is left out, with a warning.

    :return: The letters, each with all fields but ``raw``, which only unparsable rows have. Only the
        first 64 MiB of them.
    :raises ConnectionError, PermissionError, VLMError: the storage can't be read, which does not mean that nothing
        failed.
    """
    name = errors_name(shard, step)
    letters: list[dict[str, Any]] = []
    size = useless = 0
    try:
        with files.open(name) as stream:
            while line := stream.readline(MAX_LETTER_BYTES):
                size += len(line)
                if size > MAX_ERRORS_BYTES:
                    log.warning("Only the first %d dead letters in %s are read back", len(letters), name)
                    break
                letter = _parse(line)
                if _is_letter(letter):
                    letters.append(letter)
                else:
                    useless += 1
    except FileNotFoundError:
        return []
    if useless:
        log.warning("%d lines of %s are no dead letters and left out", useless, name)
    return letters


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_letter(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in _TEXTS)
        and all(type(value.get(name)) is int for name in ("row", "line", "attempts"))
        and isinstance(value.get("media"), str | None)
        and isinstance(value.get("keys"), list)
    )
