"""Reading one S3 object here and there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow_vlm_provider.shards.s3_reader import Entity, ResumingReader
from airflow_vlm_provider.shards.version_reader import VersionReader


class RandomAccessReader(VersionReader):
    """The bytes of one version of an S3 object, at any place.

    Each read is a request for just the range that is read. Broken connections are gone on from as
    :class:`~airflow_vlm_provider.shards.s3_reader.ResumingReader` does.

    :param get_object: boto3's ``get_object``, bound to bucket and key.
    :param uri: The object's URI, for messages.
    :param version: The version to read, as a response told of it.
    """

    def __init__(self, get_object: Callable[..., dict[str, Any]], *, uri: str, version: Entity) -> None:
        super().__init__(uri=uri, size=version.size)
        self._get_object = get_object
        self._version = version

    def _fill(self, view: memoryview, start: int) -> None:
        stop = start + len(view)
        with ResumingReader(
            self._get_object, uri=self._uri, version=self._version, start=start, stop=stop
        ) as part:
            done = 0
            while done < len(view):
                done += part.readinto(view[done:])
