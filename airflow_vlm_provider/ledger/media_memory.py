"""What media a shard's last commit saw: which files its references meant, and what was in them.

``media.jsonl.zst`` in the shard's ledger folder, Zstandard-compressed JSON Lines::

    {"format": "vlm-media", "version": 1, "parameters": {...}}
    {"ref": "a.jpg", "looked": [["s3://b/set/a.jpg", "<identity>"]], "digest": "<SHA-256>", "error": null}
    ...
    {"count": 1}

``looked`` is everything that was looked at for the reference, in order, each with its identity or null where there
was nothing. As long as the stores still tell the same identities the reference means the same bytes, and these need
not be read to know their digest. A picture that was replaced, deleted or put where there was none shows in them.

Invariants:

- What is not known for sure is not known: of a record that is damaged, unfinished or was written under other
  parameters nothing is used, and it counts as changed.
- Nothing is recalled before the identities were compared, or its caller vouches for them.
- Memory does not grow with the shard: what is written and what is read lies on disk.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from airflow_vlm_provider.errors import LASTING_KINDS
from airflow_vlm_provider.ledger.key_value_file import KeyValueFile
from airflow_vlm_provider.ledger.manifest import Files, ledger_folder
from airflow_vlm_provider.types import Looked

log = logging.getLogger(__name__)

Identities = Callable[[Iterable[str]], Iterator[tuple[str, str | None]]]

FILE_NAME = "media.jsonl.zst"
FORMAT = "vlm-media"
VERSION = 1
SPOOL_BYTES = 1024 * 1024
# How many lines back a repeated one is noticed, at least. Neighbouring rows share pictures; far ones cost a line more.
RECENT = 32_768
# Of the compressed record at a time: as much as is decompressed to some hundred kilobytes at the most.
_STEP_BYTES = 8 * 1024
# Lines are compressed so many bytes at a time, because each call makes the calling thread wait for the others.
_CHUNK_BYTES = 64 * 1024
_ENCODER = json.JSONEncoder(separators=(",", ":"))
# What keys in the table begin with: places come before references.
_PLACE, _REFERENCE = b"L", b"R"


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is known of a reference without looking at its file.

    :param digest: SHA-256 of the file's bytes, in hexadecimal; None when there is an error instead.
    :param looked: See :data:`~airflow_vlm_provider.types.Looked`.
    :param error: ``kind`` and ``message`` of the reason why it can't be loaded.
    """

    digest: str | None
    looked: Looked
    error: Mapping[str, str] | None


class MediaRecorder:
    """Takes down what media a run sees, on disk, until it is saved at the shard's commit. For one thread at a time.

    :param parameters: Everything besides the files that decides what is found out about them, as JSON values. What
        is remembered holds only as long as they are the same.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        import zstandard

        self.count = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - closed by close()
        self._lines: Any = zstandard.ZstdCompressor(write_checksum=True).stream_writer(
            self._spool, closefd=False
        )
        # Hashes, of 64 bits, because references can be long.
        self._recent: set[int] = set()
        self._older: set[int] = set()
        self._write({"format": FORMAT, "version": VERSION, "parameters": dict(parameters)})

    def add(
        self, ref: str, looked: Looked, digest: str | None = None, error: Mapping[str, str] | None = None
    ) -> None:
        """Take one medium down, unless nothing was looked at for it or its error may pass by itself.

        :param ref: The reference as it stands in the row.
        :param looked: What was looked at; see :class:`~airflow_vlm_provider.types.SourceMedia`.
        :param digest: SHA-256 of its bytes, in hexadecimal; None when it could not be loaded.
        :param error: ``kind`` and ``message`` of why it could not.
        """
        if not looked or (digest is None if error is None else error["kind"] not in LASTING_KINDS):
            return
        line = hash((ref, looked, digest, None if error is None else error["kind"]))
        if line in self._recent or line in self._older:
            return
        self._recent.add(line)
        if len(self._recent) >= RECENT:
            self._older, self._recent = self._recent, set()
        said = None if error is None else {"kind": error["kind"], "message": error["message"]}
        self._write({"ref": ref, "looked": looked, "digest": digest, "error": said})
        self.count += 1

    def keep(self, ref: str, memory: MediaMemory) -> None:
        """Take a medium down as the last commit did, without a look at whether it has changed.

        :param memory: What that commit took down.
        """
        if memory.is_lost:
            # No row has this reference, and no store this place: the record counts as changed.
            self.add("", (("unknown:", ""),), error={"kind": "media_missing", "message": ""})
        elif (was := memory.last(ref)) is not None:
            self.add(ref, was.looked, was.digest, was.error)

    def save(self, files: Files, shard: str, step: str) -> str | None:
        """Write the record, whole or not at all.

        :return: Its name below the shard's ledger folder; None, and nothing is written, when there were no media.
        """
        if not self.count:
            return None
        self._write({"count": self.count})
        self._compress()
        self._lines.close()
        self._spool.seek(0)
        with files.create(f"{ledger_folder(shard, step)}/{FILE_NAME}") as stream:
            shutil.copyfileobj(self._spool, stream)
        return FILE_NAME

    def close(self) -> None:
        """Free what was not saved."""
        self._lines.close()
        self._spool.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        # ASCII, so that lone surrogates out of a broken row cannot break the record.
        self._pending.append(_ENCODER.encode(line).encode() + b"\n")
        self._pending_bytes += len(self._pending[-1])
        if self._pending_bytes >= _CHUNK_BYTES:
            self._compress()

    def _compress(self) -> None:
        self._lines.write(b"".join(self._pending))
        self._pending, self._pending_bytes = [], 0


class MediaMemory:
    """What is remembered of a shard's media. Made by :meth:`read` or :meth:`empty`; for one thread at a time.

    It knows references by their text: those of media that the shard itself embeds mean something else in every row
    and must neither be recorded nor recalled.
    """

    def __init__(self, table: KeyValueFile | None, *, lost: bool) -> None:
        self._table = table
        self._changed: KeyValueFile | None = None
        self._lost = lost
        self._checked = False
        self._trusted = False

    @classmethod
    def empty(cls) -> MediaMemory:
        """The memory of a shard that was never committed, or that refers to no media."""
        return cls(None, lost=False)

    @classmethod
    def read(cls, files: Files, name: str, parameters: Mapping[str, Any]) -> MediaMemory:
        """Read the record that a manifest names. A record of no use is reported in the log, and never fatal.

        :param name: The record's name in ``files``.
        :param parameters: As for :class:`MediaRecorder`, as they are now.
        """
        table = KeyValueFile()
        try:
            table.put_many(_pairs(_lines(files, name), parameters))
        except _UselessError as error:
            table.close()
            log.warning("%s is of no use (%s), so all media are looked at again", name, error)
            return cls(None, lost=True)
        except BaseException:
            table.close()
            raise
        return cls(table, lost=False)

    def uris(self) -> Iterator[tuple[str, str | None]]:
        """Everything that was looked at, with its identity then; sorted by URI, each pair once."""
        if self._table is not None:
            for key, _ in self._table.items_sorted():
                if not key.startswith(_PLACE):
                    break
                yield _place(key)

    def verify(self, identities: Identities) -> int:
        """
        Compare with what is there now, and forget what has changed.

        :param identities: Tells the identities of sorted URIs, in their order.
        :return: How many references may mean something else by now; at least 1 when the record is of no use.
        """
        if self._table is None:
            return int(self._lost)
        changed = self._compared(identities)
        first = next(changed, None)
        if first is not None:
            self._changed = KeyValueFile()
            self._changed.put_many(chain((first,), changed))
        self._checked = True
        if self._changed is None:
            return 0
        # A reference that was taken down twice, before a change and after it, counts too, though it's known again.
        return max(1, sum(self._has_changed(looked) for looked in self._all_looked()))

    def trust(self) -> None:
        """Take everything for unchanged without a look: for places where nothing is ever replaced."""
        self._checked = self._trusted = True

    def recall(self, ref: str) -> Remembered | None:
        """Say what is known of a reference; None when that is nothing, or not for sure.

        An error is not recalled where identities are not to be had (http), unless everything is trusted: trying again
        is the only way to know.
        """
        was = self.last(ref) if self._checked else None
        if was is None or self._has_changed(was.looked):
            return None
        if was.error is not None and not self._trusted and any(identity == "" for _, identity in was.looked):
            return None
        return was

    def last(self, ref: str) -> Remembered | None:
        """Say what a reference was when the shard was committed; None when that was not taken down."""
        line = None if self._table is None else self._table.get(_REFERENCE + _encoded(ref))
        if line is None:
            return None
        record = json.loads(line)
        return Remembered(digest=record["digest"], looked=_looked(record), error=record["error"])

    @property
    def is_lost(self) -> bool:
        """Whether there should be a record and it is of no use."""
        return self._lost

    def close(self) -> None:
        """Free the files; nothing is known afterwards."""
        for table in (self._table, self._changed):
            if table is not None:
                table.close()
        self._table = self._changed = None

    def _compared(self, identities: Identities) -> Iterator[tuple[bytes, bytes]]:
        """Yield the key of every place whose identity is another one now."""
        waiting: deque[tuple[str, list[str | None]]] = deque()

        def noted() -> Iterator[str]:
            for uri, pairs in groupby(self.uris(), key=lambda pair: pair[0]):
                waiting.append((uri, [identity for _, identity in pairs]))
                yield uri

        uris = noted()
        for uri, now in identities(uris):
            expected, before = waiting.popleft()
            if uri != expected:
                raise RuntimeError(f"The identity of {uri} was told where {expected}'s was due.")
            for identity in before:
                if identity != now:
                    yield _place_key(uri, identity), b""
        if waiting or next(uris, None) is not None:
            raise RuntimeError("Not all identities were told.")

    def _all_looked(self) -> Iterator[Looked]:
        assert self._table is not None
        for key, line in self._table.items_sorted():
            if key.startswith(_REFERENCE):
                yield _looked(json.loads(line))

    def _has_changed(self, looked: Looked) -> bool:
        changed = self._changed
        return changed is not None and any(changed.get(_place_key(*each)) is not None for each in looked)


class _UselessError(Exception):
    """The record can't be used; the message says why."""


def _lines(files: Files, name: str) -> Iterator[bytes]:
    """Yield the record's lines, with nothing left out.

    :raises _UselessError: it is not there, damaged or cut off.
    """
    import zstandard

    # Not the library's own reader, which takes a frame that was cut off for a whole one.
    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    try:
        with files.open(name) as stream:
            while step := stream.read(_STEP_BYTES):
                *lines, rest = (rest + frame.decompress(step)).split(b"\n")
                yield from lines
    except FileNotFoundError as error:
        raise _UselessError("it is not there") from error
    except zstandard.ZstdError as error:
        raise _UselessError(f"it is damaged: {error}") from error
    if not frame.eof or rest or frame.unused_data:
        raise _UselessError("it is damaged: it is cut off")


def _pairs(lines: Iterator[bytes], parameters: Mapping[str, Any]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the record as the table's keys and values.

    :raises _UselessError: it is none, not whole, or not for these parameters.
    """
    count, ended = -1, False
    for line in lines:
        try:
            record = json.loads(line)
            if count < 0:
                _check_header(record, parameters)
            elif "count" in record:
                ended = record["count"] == count
            else:
                ended = False
                for each in _looked(record):
                    yield _place_key(*each), b""
                yield _REFERENCE + _encoded(record["ref"]), line
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _UselessError(f"it is damaged: {error}") from error
        count += 1
    if not ended:
        raise _UselessError("it is damaged: it has no end")


def _check_header(header: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise _UselessError(f"it is not of the format {FORMAT} {VERSION}")
    # As they are read back: what was a tuple is a list.
    if header["parameters"] != json.loads(json.dumps(dict(parameters))):
        raise _UselessError("it was written with other media roots, limits or preprocessing")


def _looked(record: Mapping[str, Any]) -> Looked:
    return tuple((uri, identity) for uri, identity in record["looked"])


def _place_key(uri: str, identity: str | None) -> bytes:
    # No URI holds a NUL, so the keys are in the order of the URIs.
    return _PLACE + _encoded(uri) + (b"\0-" if identity is None else b"\0+" + _encoded(identity))


def _place(key: bytes) -> tuple[str, str | None]:
    uri, _, identity = key[len(_PLACE) :].partition(b"\0")
    return _decoded(uri), None if identity == b"-" else _decoded(identity[1:])


def _encoded(text: str) -> bytes:
    # Sorts as the text does, and takes the lone surrogates that names on a disk can have.
    return text.encode("utf-8", "surrogatepass")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
