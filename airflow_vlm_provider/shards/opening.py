"""From a URI to the store that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.shards.s3 import S3Store
from airflow_vlm_provider.shards.stores import Store, split_uri


def open_store(uri: str, *, s3_client: Callable[[], Any] | None = None) -> Store:
    """
    Open the store at a root.

    :param uri: ``s3://bucket/prefix``, ``file:///path`` or a local path, with or without a trailing slash.
    :param s3_client: Makes the boto3 S3 client, called once when it is first needed; None uses boto3's own
        configuration.
    :raises ConfigError: The URI is of another scheme or incomplete.
    """
    scheme, bucket, path = split_uri(uri)
    if scheme == "s3":
        return S3Store(bucket=bucket, prefix=path, client_factory=s3_client)
    return LocalStore(root=path)


def locate(uri: str, *, s3_client: Callable[[], Any] | None = None) -> tuple[Store, str | None]:
    """
    Tell whether a URI is one object or the root of many.

    :param uri: As for :func:`open_store`. With a trailing slash it is a root without looking.
    :param s3_client: As for :func:`open_store`.
    :return: The store that holds the object and the object's name in it, or the store at the root and None.
        What does not exist is a root: one that lists nothing.
    :raises ConfigError: The URI is of another scheme or incomplete.
    """
    parent, slash, name = uri.rpartition("/")
    if name in ("", ".", "..") or not split_uri(uri)[2]:
        return open_store(uri, s3_client=s3_client), None
    store = open_store(parent + slash if slash else ".", s3_client=s3_client)
    try:
        store.stat(name)
    except (FileNotFoundError, IsADirectoryError):
        return open_store(uri, s3_client=s3_client), None
    return store, name
