"""A destination must not be where the shards are: the next run would take its own output for its input."""

from __future__ import annotations

import os

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.stores import is_same_authority, split_uri


def check_destination(source: str, destination: str) -> None:
    """Refuse a destination that the next run would take for its source.

    :raises ConfigError: it is the source, or lies inside it.
    """
    for name, uri in (("source", source), ("destination", destination)):
        if not isinstance(uri, str) or not uri.strip():
            raise ConfigError(
                f"{name}={uri!r} must be a URI: s3://bucket/prefix/, file:///path or a local path."
            )
    scheme, bucket, path = split_uri(destination)
    source_scheme, source_bucket, source_path = split_uri(source)
    if scheme != source_scheme or not is_same_authority(bucket, source_bucket):
        return
    if scheme == "file":
        # However it is spelt, and whatever links lead there.
        path, source_path = os.path.realpath(path), os.path.realpath(source_path)
    inner, outer = f"{path.strip('/')}/".lstrip("/"), f"{source_path.strip('/')}/".lstrip("/")
    if inner == outer:
        raise ConfigError(same_destination(source, destination))
    if inner.startswith(outer):
        raise ConfigError(
            f"destination={destination!r} lies inside source={source!r}, so the next run would take its output for "
            "input. Choose a destination beside the source."
        )


def same_destination(source: str, destination: str) -> str:
    """Say that an output would replace its input."""
    return (
        f"destination={destination!r} is where source={source!r} lies, so shards would be replaced by their own "
        "output. Choose a destination of its own."
    )
