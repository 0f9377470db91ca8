"""Where shards lie in end-to-end tests: a bucket, a folder, or a file system of fsspec's, all used alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.shards.stores import Store

_FAR = 1 << 40


class Files:
    """The files below a root.

    :param uri: The root.
    :param options: What :func:`~airflow_vlm_provider.shards.opening.open_store` needs.
    """

    def __init__(self, uri: str, **options: Callable[..., Any]) -> None:
        self.uri = uri.rstrip("/")
        self._options = options

    def __truediv__(self, folder: str) -> Files:
        return Files(f"{self.uri}/{folder}", **self._options)

    def __str__(self) -> str:
        return self.uri

    @property
    def store(self) -> Store:
        return open_store(self.uri, **self._options)

    def put(self, name: str, data: bytes) -> None:
        with self.store.create(name) as stream:
            stream.write(data)

    def get(self, name: str) -> bytes:
        return self.store.read(name, max_bytes=_FAR)

    def names(self, folder: str = "") -> list[str]:
        """What a listing shows: data, or what is below a hidden folder that is named."""
        return [info.name for info in self.store.list(folder)]

    def everything(self) -> dict[str, bytes]:
        """All data, by name."""
        return {name: self.get(name) for name in self.names()}
