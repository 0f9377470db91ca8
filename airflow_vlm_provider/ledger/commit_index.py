"""The commit index: which shards are done, told to planners without a read of every shard's manifest.

A file of it is JSON Lines compressed with Zstandard, one object for each commit; of a shard's several, the one that
finished last counts. The manifests stay the truth: a commit that is missing here is found by the run that looks at
the shard's manifest, and planners compare the identities of input and output with what is there.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from airflow_vlm_provider.ledger.index_files import MAX_FILES, IndexFiles
from airflow_vlm_provider.ledger.manifest import Files

SUFFIX = ".jsonl.zst"
_NO_KINDS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class CommitEntry:
    """What planners have to know of a shard's commit.

    :param shard: The shard's name.
    :param fingerprint: Of all besides the input that decides the output.
    :param input: Identity of the shard that was read.
    :param output_name: Name of what was written, below the destination's root.
    :param output: Its identity.
    :param rows_in: Rows read, and ``rows_out`` rows written.
    :param skipped: Rows with nothing to do.
    :param failed: Rows that became dead letters, and ``kinds`` how many of each kind.
    :param media: Whether there is a record of the media that the rows refer to.
    :param finished_at: ISO 8601, UTC, to the microsecond: of two commits, the later one's sorts last.
    """

    shard: str
    fingerprint: str
    input: str
    output_name: str
    output: str
    rows_in: int
    rows_out: int
    skipped: int
    failed: int
    kinds: Mapping[str, int]
    media: bool
    finished_at: str


Commits = dict[str, CommitEntry]
_FIELDS = tuple(each.name for each in fields(CommitEntry))


class CommitIndex:
    """The commit index of a step at a destination. Safe to use from several threads at once.

    :param files: The destination.
    """

    def __init__(self, files: Files, *, step: str) -> None:
        self._index = IndexFiles(
            files,
            folder=f"_vlm/_index/{step}/commits",
            suffix=SUFFIX,
            decode=_decode,
            encode=_encode,
            union=_union,
        )

    def add(self, entries: Iterable[CommitEntry]) -> None:
        """Make commits known; their manifests are there already."""
        if commits := _latest(entries):
            self._index.add(commits)

    def load(self) -> Commits:
        """Every shard's last commit, by the shard's name.

        :raises PermissionError: access is denied.
        :raises ConnectionError: the storage can't be reached.
        """
        return _union(self._index.load())

    def merge(self, max_files: int = MAX_FILES) -> Commits:
        """As :meth:`load`; when there are more files than ``max_files``, they are merged if that is possible."""
        return _union(self._index.merge(max_files=max_files))


def _latest(entries: Iterable[CommitEntry]) -> Commits:
    commits: Commits = {}
    for entry in entries:
        other = commits.get(entry.shard)
        if other is None or _order(entry) > _order(other):
            commits[entry.shard] = entry
    return commits


def _union(several: Sequence[Commits]) -> Commits:
    return _latest(entry for commits in several for entry in commits.values())


def _order(entry: CommitEntry) -> tuple[str, ...]:
    # What comes after the time only makes sure that all who see both choose the same.
    return entry.finished_at, entry.fingerprint, entry.input, entry.output_name, entry.output


def _encode(commits: Commits) -> bytes:
    import zstandard

    lines = io.BytesIO()
    with zstandard.ZstdCompressor(write_checksum=True).stream_writer(lines, closefd=False) as stream:
        for _, entry in sorted(commits.items()):
            record = {name: getattr(entry, name) for name in _FIELDS}
            stream.write(json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    return lines.getvalue()


def _decode(data: bytes) -> Commits:
    import zstandard

    commits: Commits = {}
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as stream:
            for line in io.BufferedReader(stream):
                entry = _entry(json.loads(line))
                commits[entry.shard] = entry
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return commits


def _entry(record: Mapping[str, object]) -> CommitEntry:
    """An entry of its JSON object, with one copy in memory of what most entries have in common."""
    values = {name: record[name] for name in _FIELDS}
    values["fingerprint"] = sys.intern(str(record["fingerprint"]))
    values["kinds"] = record["kinds"] or _NO_KINDS
    if record["output_name"] == record["shard"]:
        values["output_name"] = record["shard"]
    return CommitEntry(**values)  # type: ignore[arg-type]
