"""The manifest: the commit of one shard under one step.

It is written last, after the output and the dead letters, so whoever finds it finds all of them. A shard whose
manifest names the same input and the same fingerprint, and no failures, has nothing left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, BinaryIO, Protocol

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.canonical import canonical
from airflow_vlm_provider.types import Outcome, Usage

MAX_MANIFEST_BYTES = 1024 * 1024


class Files(Protocol):
    """What the ledger needs of the place that it is kept in: a store of the shards' room has it."""

    def read(self, name: str, *, max_bytes: int) -> bytes: ...

    def open(self, name: str) -> BinaryIO: ...

    def create(self, name: str) -> AbstractContextManager[BinaryIO]: ...

    def list(self, folder: str = "") -> Iterator[FileInfo]: ...

    def delete(self, name: str) -> None: ...


class FileInfo(Protocol):
    """A file's listing entry."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def modified(self) -> float: ...


class UnaccountedError(VLMError):
    """Rows went in that came out nowhere. Nothing is committed; this is a defect of this package."""


@dataclass(slots=True)
class Counts:
    """How many rows ended how, and what they cost. ``rows_in == ok + cached + skipped + failed``, always.

    :param rows_in: Rows read, malformed ones included.
    :param rows_out: Rows written.
    :param ok: Rows answered (or found to need no answer) by this run.
    :param cached: Rows answered from what an earlier run had asked.
    :param skipped: Rows with nothing to do, written back as they were.
    :param failed: Rows that became dead letters.
    :param cost_usd: US dollars by the connection's prices; None when it names none.
    """

    rows_in: int = 0
    rows_out: int = 0
    ok: int = 0
    cached: int = 0
    skipped: int = 0
    failed: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None

    def add(self, outcome: Outcome, *, rows_out: int) -> None:
        """Count one row's end."""
        setattr(self, outcome.status, getattr(self, outcome.status) + 1)
        self.rows_out += rows_out
        self.requests += outcome.usage.requests
        self.prompt_tokens += outcome.usage.prompt_tokens
        self.completion_tokens += outcome.usage.completion_tokens

    def __add__(self, other: Counts) -> Counts:
        added = Counts()
        for each in fields(Counts):
            if each.name != "cost_usd":
                setattr(added, each.name, getattr(self, each.name) + getattr(other, each.name))
        known = [cost for cost in (self.cost_usd, other.cost_usd) if cost is not None]
        added.cost_usd = sum(known) if known else None
        return added

    def check(self) -> None:
        """Raise unless every row is accounted for.

        :raises UnaccountedError: the sum is off.
        """
        if self.rows_in != self.ok + self.cached + self.skipped + self.failed:
            raise UnaccountedError(
                f"{self.rows_in} rows were read, but {self.ok} ok + {self.cached} cached + {self.skipped} skipped"
                f" + {self.failed} failed do not add up to them. Nothing was committed; please report this."
            )

    @property
    def usage(self) -> Usage:
        return Usage(self.requests, self.prompt_tokens, self.completion_tokens)


@dataclass(slots=True)
class Manifest:
    """One shard's commit.

    :param counts: Stands at the top level of the JSON.
    :param model: The model that was asked.
    :param fingerprint: Hash of everything besides the input that decides the output.
    :param parameters: What the fingerprint is made of: ``step``, ``engine`` and ``media``, each with its parameters.
    :param kinds: How many rows failed by kind of dead letter.
    :param journal: Names, below the shard's ledger folder, of the journal segments that hold every answer that the
        output was made from.
    :param media: Name, below the shard's ledger folder, of the record of what media there were; None when the rows
        refer to none.
    :param input: ``uri`` and ``identity`` of the shard that was read.
    :param output: ``uri`` of what was written.
    :param errors: URI of the dead letters; None when there are none.
    :param started_at: ISO 8601, UTC.
    :param written_by: DAG, run, task, map index and try that wrote it; at the top level of the JSON.
    """

    counts: Counts
    model: str
    fingerprint: str
    input: Mapping[str, str]
    output: Mapping[str, str]
    errors: str | None
    started_at: str
    finished_at: str
    provider_version: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    journal: Sequence[str] = field(default_factory=list)
    media: str | None = None
    written_by: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest as the JSON object on disk."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("counts", "written_by")}
        return {**asdict(self.counts), **own, **self.written_by}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read :meth:`to_json`'s object back.

        :raises KeyError: a field is missing.
        """
        counts = {f.name: data[f.name] for f in fields(Counts)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        known = {f.name for f in fields(cls)} - {"counts", "written_by"}
        own = {name: data[name] for name in known if name in required or name in data}
        rest = {key: value for key, value in data.items() if key not in counts and key not in own}
        return cls(counts=Counts(**counts), written_by=rest, **own)


def is_too_many(failed: int, *, rows_in: int, max_error_rate: float) -> bool:
    """Whether more rows failed than an author accepts."""
    # Divided, because 0.29 * 100 is less than 29.
    return failed > 0 and failed / rows_in > max_error_rate


def ledger_folder(shard: str, step: str) -> str:
    """The folder of a shard's ledger under the destination."""
    return f"_vlm/{shard}/{step}"


def fingerprint(**parts: Any) -> str:
    """Hash what decides an output, given as JSON values by name: equal exactly when all parts are.

    SHA-256 of their :func:`~airflow_vlm_provider.ledger.canonical.canonical` spelling, in hexadecimal.

    :raises TypeError: a part is not a JSON value.
    """
    return hashlib.sha256(canonical(parts)).hexdigest()


def load_manifest(files: Files, shard: str, step: str) -> Manifest | None:
    """Read a shard's manifest; None when there is none, or it is not readable as one (the shard is then redone)."""
    try:
        data = files.read(f"{ledger_folder(shard, step)}/manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    try:
        return Manifest.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError):
        return None


def save_manifest(files: Files, shard: str, step: str, manifest: Manifest) -> None:
    """Commit: write a shard's manifest.

    :raises UnaccountedError: its counts do not add up; nothing is written.
    """
    manifest.counts.check()
    with files.create(f"{ledger_folder(shard, step)}/manifest.json") as stream:
        stream.write(json.dumps(manifest.to_json(), indent=2, ensure_ascii=False).encode() + b"\n")
