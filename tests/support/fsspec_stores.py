"""A file system of fsspec's that is watched, and a store on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from airflow_vlm_provider.shards.fsspec_store import FsspecStore


class Watched(MemoryFileSystem):
    """A file system of its own that tells what is done with it, and does something before."""

    cachable = False

    def __init__(self) -> None:
        super().__init__(global_store=False)
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], object]] = {}

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if what in self.before:
            self.before[what]()

    def info(self, path: str, **kwargs: Any) -> Any:
        self._called("info")
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._called("ls")
        return super().ls(path, detail, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        self._called("cat_file")
        return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._called("pipe_file")
        super().pipe_file(path, value, mode, **kwargs)


def watched_store(fs: Watched) -> FsspecStore:
    """Return a store on the file system."""
    return FsspecStore(uri="memory://bucket/base", filesystem=lambda _: fs)


def put(store: FsspecStore, name: str, data: bytes = b"data") -> None:
    """Write an object to the store."""
    with store.create(name) as stream:
        stream.write(data)
