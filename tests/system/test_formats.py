"""Shards that embed their pictures go through a user's DAG, and the libraries they are made for read what comes out."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import webdataset

from demo.drawings import draw
from tests.support.stub_endpoint import tag_of
from tests.system.conftest import Deployment, tags

pytestmark = pytest.mark.system

ROWS = 10
CUT = 3


@pytest.fixture
def pictures() -> list[bytes]:
    rng = random.Random(10)
    return [draw(rng, side=96).encode("PNG") for _ in range(2 * ROWS)]


def hugging_face(pictures: list[bytes], folder: Path) -> bytes:
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    columns: dict[str, list[Any]] = {
        "images": [[{"bytes": each, "path": f"{number}.png"}] for number, each in enumerate(pictures)],
        "label": [number % 2 for number in range(len(pictures))],
    }
    path = folder / "made.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path.read_bytes()


def tar(pictures: list[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, picture in enumerate(pictures):
            for suffix, data in (("png", picture), ("json", json.dumps({"id": number}).encode())):
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def fetched(deployment: Deployment, key: str, folder: Path) -> str:
    path = folder / key.replace("/", "-")
    path.write_bytes(deployment.get("users", key))
    return str(path)


def test_embedded_pictures_are_tagged_beside_the_shard_or_in_it(deployment, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    prefix, out = "embedded/", "out/embedded"
    in_parquet, in_tar = pictures[:ROWS], pictures[ROWS:]
    in_parquet[CUT] = in_parquet[CUT][:100]
    parquet_shard, tar_shard = hugging_face(in_parquet, tmp_path), tar(in_tar)
    deployment.put("users", prefix + "faces.parquet", parquet_shard)
    deployment.put("users", prefix + "places.tar", tar_shard)
    asked = deployment.asked()
    run_id = deployment.run("embedded", prefix, destination=f"s3://users/{out}")
    # The second task finds all answers in the first one's journals.
    assert deployment.asked() - asked == 2 * ROWS - 1
    result = deployment.airflow.xcom("embedded", run_id, "in_full")
    assert (result["cached"], result["failed"], result["requests"]) == (2 * ROWS - 1, 1, 0)

    def right(data: bytes, found: Any) -> bool:
        return found is None if data == in_parquet[CUT] else found[0][0] == tag_of(data)

    # Beside: keys and generated fields, and no picture.
    expected = {"faces.parquet": in_parquet, "places.parquet": in_tar}
    assert {key for key in deployment.keys("users", f"{out}/beside/") if "/_vlm/" not in key} == {
        f"{out}/beside/{name}" for name in expected
    }
    for name, data in expected.items():
        table = pq.read_table(fetched(deployment, f"{out}/beside/{name}", tmp_path))
        assert table.column_names == ["key", "row", "__dj__meta__"]
        assert table["row"].to_pylist() == list(range(ROWS))
        found = [meta and meta["image_tags"] for meta in table["__dj__meta__"].to_pylist()]
        assert all(map(right, data, found))
        assert table.nbytes < len(parquet_shard) / 4
    keys = pq.read_table(fetched(deployment, f"{out}/beside/places.parquet", tmp_path))["key"].to_pylist()
    assert keys == [f"{number:04}" for number in range(ROWS)]

    # In full: everything that was there, and the tags.
    path = fetched(deployment, f"{out}/full/faces.parquet", tmp_path)
    loaded = datasets.load_dataset(
        "parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["label"].names == ["cat", "dog"]
    raw = loaded.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert [row["images"][0]["bytes"] for row in raw] == in_parquet
    assert [row["label"] for row in raw] == [number % 2 for number in range(ROWS)]
    found = [(row["__dj__meta__"] or {}).get("image_tags") for row in raw]
    assert all(map(right, in_parquet, found))

    path = fetched(deployment, f"{out}/full/places.tar", tmp_path)
    samples = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [(sample["__key__"], sample["png"]) for sample in samples] == list(zip(keys, in_tar, strict=True))
    rows = [json.loads(sample["json"]) for sample in samples]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [tags(row)[0][0] for row in rows] == [tag_of(data) for data in in_tar]
