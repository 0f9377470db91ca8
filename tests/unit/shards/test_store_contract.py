"""The contract of stores, kept by a local directory and by fsspec's file systems."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.shards.fsspec_store import FsspecStore
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.store_contract import Opener, StoreContract


class TestLocalStore(StoreContract):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda: LocalStore(root=str(tmp_path / "base"))


class TestInMemory(StoreContract):
    """An object store: directories are but parts of names, and a put is atomic."""

    @pytest.fixture
    def opener(self) -> Opener:
        uri = f"memory://bucket-{uuid.uuid4().hex}/prefix"
        return lambda: FsspecStore(uri=uri)


class TestInMemoryAsynchronously(StoreContract):
    """As the file systems of Google's and Azure's object stores are made."""

    @pytest.fixture
    def opener(self) -> Opener:
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
        from fsspec.implementations.memory import MemoryFileSystem

        def filesystem(uri: str) -> Any:
            return AsyncFileSystemWrapper(MemoryFileSystem())

        uri = f"memory://bucket-{uuid.uuid4().hex}/prefix"
        return lambda: FsspecStore(uri=uri, filesystem=filesystem)


class TestLocalFilesByFsspec(StoreContract):
    """A file system that moves files."""

    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        from fsspec.implementations.local import LocalFileSystem

        uri = f"file://{tmp_path}/base"
        return lambda: FsspecStore(uri=uri, filesystem=lambda _: LocalFileSystem())
