"""A dataset's folder with pictures, and loaders of what lies in it."""

from __future__ import annotations

from pathlib import Path

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import Looked, MediaRef
from tests.support.images import encode, photo
from tests.support.media import load_media

JPEG = encode(photo(), "JPEG")
SECRET = encode(photo(8, 8), "PNG")


def dataset_folder(tmp_path: Path) -> Path:
    """Make a dataset's folder with shards and pictures, and a picture outside that it must not reach."""
    folder = tmp_path / "data"
    (folder / "shards" / "pics").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(JPEG)
    (folder / "shards" / "b.jpg").write_bytes(JPEG)
    (folder / "shards" / "pics" / "c.jpg").write_bytes(JPEG)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(SECRET)
    return folder


def loader(folder: Path, **options: object) -> MediaLoader:
    """A loader for the dataset in a folder."""
    return MediaLoader(source_uri=f"file://{folder}/", **options)  # type: ignore[arg-type]


def load(folder: Path, ref: str, *, shard: str = "shards/1.jsonl", **options: object) -> bytes:
    """A picture as a loader of its own makes it fit to be sent."""
    media = load_media(loader(folder, **options), MediaRef("image", ref), shard=shard)
    assert media.ref == ref
    assert media.kind == "image"
    return media.data


def looked_at(loader: MediaLoader, ref: str) -> Looked:
    """What a fetch looked at, whether it found anything or not."""
    try:
        return loader.fetch(MediaRef("image", ref), shard="shards/1.jsonl").looked
    except SampleError as error:
        return error.looked
