"""Data sets of Hugging Face's: what their library wrote is read here, and what is written here it reads again."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from airflow_vlm_provider.types import Row, Sample
from tests.support.images import encode, quarters
from tests.support.parquet_shards import META, opened, parquet, rewritten, samples_of, table_of

TAGS = {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
GENERATED: dict[str, Any] = {
    META: {"type": "object", "properties": {"image_tags": TAGS}},
    "caption": {"type": "string"},
    "scores": {"type": "array", "items": {"type": "number"}},
    "boxes": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
PICTURES = [encode(quarters(size), "PNG") for size in (8, 16, 24)]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shard_of(features: datasets.Features, rows: list[dict[str, Any]], tmp_path: Path) -> bytes:
    path = tmp_path / "source.parquet"
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path.read_bytes()


def load(shard: bytes, tmp_path: Path) -> datasets.Dataset:
    path = tmp_path / "written.parquet"
    path.write_bytes(shard)
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )


def answered(sample: Sample) -> Sequence[Row] | None:
    if sample.index == 1:
        return None
    row = sample.row or {}
    meta = {**(row.get(META) or {}), "image_tags": [["a"], []]}
    return [{**row, META: meta, "caption": "c", "scores": [0.5], "boxes": [{"x": 1}]}]


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            META: {"width": datasets.Value("int32")},
        }
    )
    rows = [
        {
            "image": {"bytes": picture, "path": f"{index}.png"},
            "images": [{"bytes": picture, "path": None}] * index,
            "label": index % 2,
            META: {"width": index},
        }
        for index, picture in enumerate(PICTURES)
    ]
    return shard_of(features, rows, tmp_path)


def test_its_images_are_read(shard: bytes) -> None:
    samples = samples_of(shard)
    with opened(shard) as reader:
        assert reader.embeds_media
    for sample, picture in zip(samples, PICTURES, strict=True):
        row = sample.row or {}
        assert sample.embedded[row["image"]] == picture
        assert [sample.embedded[each] for each in row["images"]] == [picture] * sample.index
        assert (row["label"], row[META]) == (sample.index % 2, {"width": sample.index})


def test_it_reads_what_is_written_with_features_of_old_and_new_columns(shard: bytes, tmp_path: Path) -> None:
    before, after = load(shard, tmp_path), load(rewritten(shard, GENERATED, answered), tmp_path)
    strings = datasets.List(datasets.List(datasets.Value("string")))
    assert after.features == datasets.Features(
        {
            **before.features,
            META: {"width": datasets.Value("int32"), "image_tags": strings},
            "caption": datasets.Value("string"),
            "scores": datasets.List(datasets.Value("float64")),
            "boxes": datasets.List({"x": datasets.Value("int64")}),
        }
    )
    assert [row["image"].size for row in after] == [(8, 8), (16, 16), (24, 24)]
    assert after[2]["images"][1].tobytes() == quarters(24).tobytes()
    assert after["caption"][:] == ["c", None, "c"]
    assert after[0][META] == {"width": 0, "image_tags": [["a"], []]}
    assert after[1][META] == {"width": 1, "image_tags": None}
    assert (after[0]["scores"], after[0]["boxes"], after[1]["boxes"]) == ([0.5], [{"x": 1}], None)
    assert after.features["label"].names == ["cat", "dog"]


def test_bytes_of_images_are_the_same(shard: bytes) -> None:
    again = rewritten(shard, GENERATED, answered)
    for column in ("image", "images"):
        assert table_of(again).column(column).equals(table_of(shard).column(column))


def test_features_are_named_in_the_files_metadata_and_not_only_inferred(shard: bytes) -> None:
    again = table_of(rewritten(shard, GENERATED, answered))
    notes = json.loads(again.schema.metadata[b"huggingface"])
    assert list(notes["info"]["features"]) == again.schema.names
    assert notes["info"]["features"]["image"] == {"_type": "Image"}


def test_a_second_step_extends_what_the_first_wrote(shard: bytes, tmp_path: Path) -> None:
    first = rewritten(shard, GENERATED, answered)
    second = rewritten(first, {META: {"type": "object", "properties": {"more": {"type": "integer"}}}})
    read = load(second, tmp_path)
    assert list(read.features[META]) == ["width", "image_tags", "more"]
    assert read.features["image"] == datasets.Image()


@pytest.mark.parametrize(
    "notes",
    [
        b"no JSON",
        b"[]",
        b"{}",
        json.dumps({"info": {"features": {META: {"_type": "Sequence", "feature": {}}}}}).encode(),
    ],
)
def test_notes_that_cannot_be_extended_are_left_out_and_others_stay(notes: bytes, tmp_path: Path) -> None:
    table = pa.table({META: [{"width": 1}]}).replace_schema_metadata(
        {b"huggingface": notes, b"mine": b"kept"}
    )
    again = rewritten(parquet(table), GENERATED)
    assert table_of(again).schema.metadata == {b"mine": b"kept"}
    assert list(load(again, tmp_path).features) == [META, "caption", "scores", "boxes"]


def test_notes_stay_as_they_are_where_no_column_changes(shard: bytes) -> None:
    table = table_of(shard)
    odd = table.replace_schema_metadata({b"huggingface": b'{"info":  {"features": null}}'})
    for source in (table, odd):
        again = table_of(rewritten(parquet(source), {"label": {"type": "integer"}}))
        assert again.schema.equals(source.schema, check_metadata=True)


def test_columns_of_nulls_get_features(tmp_path: Path) -> None:
    features = datasets.Features(
        {"caption": datasets.Value("null"), META: {"image_tags": datasets.Value("null")}}
    )
    rows: list[dict[str, Any]] = [{"caption": None, META: {"image_tags": None}}] * 3
    read = load(rewritten(shard_of(features, rows, tmp_path), GENERATED, answered), tmp_path)
    assert read.features["caption"] == datasets.Value("string")
    assert read[0][META] == {"image_tags": [["a"], []]}


def test_it_reads_a_shard_of_other_tools_with_new_columns(tmp_path: Path) -> None:
    stream = io.BytesIO(rewritten(parquet({"images": [["a.png"]] * 3}), GENERATED, answered))
    assert load(stream.getvalue(), tmp_path)[0]["caption"] == "c"
