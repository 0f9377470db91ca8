"""Airflow's connections on one side, stores on the other."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from airflow_vlm_provider.shards.stores import ObjectInfo, Store

# Many small reads are in flight at once; botocore's own default is ten connections.
POOL_CONNECTIONS = 64
# A key has at most 1,024 bytes on S3. Beside the shard's own name, the ledger's folder and the destination's prefix
# have to find room in it.
MAX_NAME_BYTES = 768

# What Airflow's own providers have file systems for.
_PROVIDERS = {
    "gs": "apache-airflow-providers-google",
    "gcs": "apache-airflow-providers-google",
    "abfs": "apache-airflow-providers-microsoft-azure",
    "abfss": "apache-airflow-providers-microsoft-azure",
    "adl": "apache-airflow-providers-microsoft-azure",
    "sftp": "apache-airflow-providers-sftp[sshfs]",
    "ssh": "apache-airflow-providers-sftp[sshfs]",
}

# How many shards are looked up at once.
LOOKUP_THREADS = 16

log = logging.getLogger(__name__)


def s3_client_factory(aws_conn_id: str | None) -> Callable[[], Any]:
    """Make S3 clients by Airflow's S3Hook; all callers of the returned function share one, which is thread-safe.

    :param aws_conn_id: Connection to use; None uses boto3's own search for credentials.
    """

    @functools.cache
    def client() -> Any:
        from airflow.providers.amazon.aws.hooks.s3 import S3Hook
        from botocore.config import Config

        config = Config(
            max_pool_connections=POOL_CONNECTIONS,
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 8},
        )
        return S3Hook(aws_conn_id=aws_conn_id, config=config).get_conn()

    return client


def filesystem_factory(storage_conn_id: str | None) -> Callable[[str], AbstractFileSystem]:
    """Make the file systems of other object stores than S3 as Airflow's ``ObjectStoragePath`` does.

    :param storage_conn_id: Connection to use for URIs that name none themselves (``gs://connection@bucket/``); None
        uses what the scheme's provider takes by default.
    """

    def filesystem(uri: str) -> AbstractFileSystem:
        from airflow.sdk import ObjectStoragePath
        from airflow.sdk.exceptions import AirflowNotFoundException, AirflowOptionalProviderFeatureException

        scheme = uri.partition("://")[0]
        try:
            return ObjectStoragePath(uri, conn_id=storage_conn_id).fs
        except (ValueError, ImportError, AirflowOptionalProviderFeatureException) as error:
            package = _PROVIDERS.get(scheme)
            remedy = (
                f"Install {package} on the workers"
                if package
                else "Install the provider that has it on the workers, or register one by airflow.sdk.io.attach()"
            )
            raise ConfigError(
                f"{uri!r} can't be opened: Airflow has no file system for {scheme}:// ({error}). {remedy}, or use s3:// "
                "or file://."
            ) from error
        except AirflowNotFoundException as error:
            raise ConfigError(
                f"{uri!r} can't be opened: {error}. Create the connection, or correct storage_conn_id or the part of "
                "the URI before '@'."
            ) from error

    return filesystem


class Storage:
    """The object stores, as a task's connections reach them; it opens none before it is needed.

    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials.
    :param storage_conn_id: Connection for other object stores; None uses the one in the URI, or the scheme's default.
    """

    def __init__(self, *, aws_conn_id: str | None, storage_conn_id: str | None = None) -> None:
        self.s3_client = s3_client_factory(aws_conn_id)
        self.filesystem = filesystem_factory(storage_conn_id)

    def open_store(self, uri: str) -> Store:
        """Open the store at a root.

        :raises ConfigError: The URI is malformed or incomplete, or never names a store.
        """
        from airflow_vlm_provider.shards.opening import open_store

        return open_store(uri, s3_client=self.s3_client, filesystem=self.filesystem)

    def locate(self, uri: str) -> tuple[Store, str | None]:
        """Tell whether a URI is one object (the store that it is in, and its name) or the root of many (and None).

        :raises ConfigError: As :meth:`open_store`; and there is no file system for the scheme.
        """
        from airflow_vlm_provider.shards.opening import locate

        return locate(uri, s3_client=self.s3_client, filesystem=self.filesystem)


def find_shards(
    source: str, names: Sequence[str] | None = None, *, storage: Storage
) -> tuple[Store, list[ObjectInfo]]:
    """Look up the shards of a source.

    :param source: A prefix or one shard.
    :param names: Names under the source; None takes the shard that it is, or all of a supported format below it.
    :return: The store that the shards are in, and the shards, by name or in the order of ``names``.
    :raises ConfigError: the source holds none, a name is not there, or its format is not supported.
    """
    from airflow_vlm_provider.shards.formats import FORMATS, is_shard, shard_format
    from airflow_vlm_provider.shards.stores import InvalidNameError, is_hidden

    store, name = storage.locate(source)
    if names is None:
        names = None if name is None else [name]
    if names is None:
        try:
            found = [each for each in store.list() if is_shard(each.name) and _is_usable(each.name)]
        except FileNotFoundError as error:
            raise ConfigError(f"source={source!r} can't be listed: {error}") from error
        if not found:
            formats = ", ".join(suffix for each in FORMATS for suffix in each.suffixes)
            raise ConfigError(
                f"source={source!r} holds no shards: there is no file of a supported format ({formats}) there, not "
                "counting names that begin with '_' or '.'. Check the path, and what the connection may list."
            )
        return store, found

    def look_up(each: str) -> ObjectInfo:
        shard_format(each)
        if is_hidden(each):
            raise ConfigError(
                f"shards names {each!r}, a part of which begins with '_' or '.': such names are no data, and neither "
                "the next step nor a redrive would find what became of it. Rename it."
            )
        try:
            return store.stat(each)
        except InvalidNameError as error:
            raise ConfigError(
                f"shards names {each!r}, which can't be the name of a shard: {error}"
            ) from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ConfigError(
                f"shards names {each!r}, which is not to be found below source={source!r}. Names are relative to the "
                "source; was it planned for another source, or was the shard deleted since?"
            ) from error

    # A plan's groups are spread over the whole source: listing it would take longer than asking for each.
    with ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="vlm-find") as threads:
        return store, list(threads.map(look_up, dict.fromkeys(names)))


def _is_usable(name: str) -> bool:
    """Whether a shard of this name can be read and written back; says so when not, for it is left out then."""
    from airflow_vlm_provider.shards.stores import InvalidNameError, check_name

    try:
        check_name(name)
    except InvalidNameError as error:
        log.warning("Left out a shard: %s", error)
        return False
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        log.warning(
            "Left out a shard: there is no room for its ledger beside its name, which is too long: %r", name
        )
        return False
    return True
