"""Loading media in one go, as a request's way takes them in two."""

from __future__ import annotations

from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import Media, MediaRef


def load_media(loader: MediaLoader, ref: MediaRef, *, shard: str = "") -> Media:
    (media,) = loader.prepare(loader.fetch(ref, shard=shard))
    return media
