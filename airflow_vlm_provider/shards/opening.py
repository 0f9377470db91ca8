"""From a URI to the store that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.shards.fsspec_store import FsspecStore
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.shards.s3 import S3Store
from airflow_vlm_provider.shards.stores import Store, split_uri

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def open_store(
    uri: str,
    *,
    s3_client: Callable[[], Any] | None = None,
    filesystem: Callable[[str], AbstractFileSystem] | None = None,
) -> Store:
    """
    Open the store at a root.

    :param uri: ``s3://bucket/prefix``, ``file:///path``, a local path, or a URI of any scheme that there is an fsspec
        file system for (``gs://bucket/prefix``, ``abfs://container/prefix``); with or without a trailing slash.
    :param s3_client: Makes the boto3 S3 client, called once when it is first needed; None uses boto3's own
        configuration.
    :param filesystem: Makes the file system for a URI of another scheme, called once when it is first needed; None
        uses fsspec's own configuration.
    :raises ConfigError: The URI is malformed or incomplete, or never names a store. A file system that is not there is
        only missed when the store is first used.
    """
    scheme, bucket, path = split_uri(uri)
    if scheme == "s3":
        return S3Store(bucket=bucket, prefix=path, client_factory=s3_client)
    if scheme == "file":
        return LocalStore(root=path)
    return FsspecStore(uri=uri, filesystem=filesystem)


def locate(
    uri: str,
    *,
    s3_client: Callable[[], Any] | None = None,
    filesystem: Callable[[str], AbstractFileSystem] | None = None,
) -> tuple[Store, str | None]:
    """
    Tell whether a URI is one object or the root of many.

    :param uri: As for :func:`open_store`. With a trailing slash it is a root without looking.
    :param s3_client: As for :func:`open_store`.
    :param filesystem: As for :func:`open_store`.
    :return: The store that holds the object and the object's name in it, or the store at the root and None.
        What does not exist is a root: one that lists nothing.
    :raises ConfigError: As for :func:`open_store`; and there is no file system for the scheme.
    """
    parent, slash, name = uri.rpartition("/")
    root = open_store(uri, s3_client=s3_client, filesystem=filesystem)
    if name in ("", ".", "..") or not split_uri(uri)[2]:
        return root, None
    store = open_store(parent + slash if slash else ".", s3_client=s3_client, filesystem=filesystem)
    try:
        store.stat(name)
    except (FileNotFoundError, IsADirectoryError):
        return root, None
    return store, name
