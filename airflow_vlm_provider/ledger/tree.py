"""The ledger's files as they lie below a destination: which shard and step each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from airflow_vlm_provider.ledger.manifest import FileInfo, Files

LEDGER_FOLDER = "_vlm"

# The shard's name comes first and may look like anything, so the rest is told from the end.
_NAME = re.compile(
    rf"{LEDGER_FOLDER}/(?P<shard>.+)/(?P<step>[^/]+)/"
    r"(?P<file>manifest\.json|errors\.jsonl|media\.jsonl\.zst|journal/[^/]+)",
    re.DOTALL,
)


class Place(NamedTuple):
    """A shard under a step."""

    shard: str
    step: str


class LedgerFile(NamedTuple):
    """A file of a shard's ledger.

    :param file: Its name below the shard's ledger folder: ``manifest.json``, ``journal/...``
    """

    place: Place
    file: str
    info: FileInfo


def walk(files: Files, shard: str | None = None) -> Iterator[LedgerFile]:
    """Yield the files of all shards, or of one, by name; what is not the ledger's, or not a shard's, is left out."""
    folder = LEDGER_FOLDER if shard is None else f"{LEDGER_FOLDER}/{shard}"
    for info in files.list(folder):
        match = _NAME.fullmatch(info.name)
        if match is not None and shard in (None, match["shard"]):
            yield LedgerFile(Place(match["shard"], match["step"]), match["file"], info)
