"""Airflow's connections on one side, stores on the other."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store

# Many small reads are in flight at once; botocore's own default is ten connections.
POOL_CONNECTIONS = 64
# A key has at most 1,024 bytes on S3. Beside the shard's own name, the ledger's folder and the destination's prefix
# have to find room in it.
MAX_NAME_BYTES = 768

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


def find_shards(
    source: str, names: Sequence[str] | None = None, *, s3_client: Callable[[], Any]
) -> tuple[Store, list[ObjectInfo]]:
    """Look up the shards of a source.

    :param source: A prefix or one shard.
    :param names: Names under the source; None takes the shard that it is, or all of a supported format below it.
    :return: The store that the shards are in, and the shards, by name or in the order of ``names``.
    :raises ConfigError: the source holds none, a name is not there, or its format is not supported.
    """
    from airflow_vlm_provider.shards.formats import is_shard, shard_format
    from airflow_vlm_provider.shards.opening import locate
    from airflow_vlm_provider.shards.stores import InvalidNameError

    store, name = locate(source, s3_client=s3_client)
    if names is None:
        names = None if name is None else [name]
    if names is None:
        try:
            found = [each for each in store.list() if is_shard(each.name) and _is_usable(each.name)]
        except FileNotFoundError as error:
            raise ConfigError(f"source={source!r} can't be listed: {error}") from error
        if not found:
            raise ConfigError(
                f"source={source!r} holds no shards: there is no file of a supported format (.jsonl, .jsonl.gz, "
                ".jsonl.zst) there, not counting names that begin with '_' or '.'. Check the path, and what the "
                "connection may list."
            )
        return store, found
    found = []
    for each in dict.fromkeys(names):
        shard_format(each)
        try:
            found.append(store.stat(each))
        except InvalidNameError as error:
            raise ConfigError(
                f"shards names {each!r}, which can't be the name of a shard: {error}"
            ) from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ConfigError(
                f"shards names {each!r}, which is not to be found below source={source!r}. Names are relative to the "
                "source; was it planned for another source, or was the shard deleted since?"
            ) from error
    return store, found


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
