"""The ledger's files in memory, with the listing rules of a store."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from airflow_vlm_provider.shards.stores import ObjectTooLargeError, is_hidden


@dataclass(frozen=True)
class MemoryFile:
    name: str
    size: int
    modified: float


class MemoryFiles:
    """Files by name.

    :param broken: Names that can't be read: as if the storage were away.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.modified: dict[str, float] = {}
        self.broken: set[str] = set()
        self.deleted: list[str] = []

    def read(self, name: str, *, max_bytes: int) -> bytes:
        if name in self.broken:
            raise ConnectionError(f"{name} is out of reach")
        if name not in self.files:
            raise FileNotFoundError(name)
        if len(self.files[name]) > max_bytes:
            raise ObjectTooLargeError(f"{name} is larger than {max_bytes} bytes.")
        return self.files[name]

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name, max_bytes=1 << 40))

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        stream = io.BytesIO()
        yield stream
        self.put(name, stream.getvalue())

    def put(self, name: str, data: bytes, *, modified: float | None = None) -> None:
        self.files[name] = data
        self.modified[name] = time.time() if modified is None else modified

    def list(self, folder: str = "") -> Iterator[MemoryFile]:
        prefix = f"{folder}/" if folder else ""
        for name in sorted(self.files):
            if name.startswith(prefix) and not is_hidden(name[len(prefix) :]):
                yield MemoryFile(name, len(self.files[name]), self.modified[name])

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        self.files.pop(name, None)
