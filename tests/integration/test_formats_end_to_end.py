"""Every format by itself through the operators' ``execute``: what is written, who can read it, and what it costs."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard
from PIL import Image

from tests.support.places import Files
from tests.support.stub_endpoint import tag_of
from tests.support.tagging_world import (
    FIELD,
    META,
    World,
    letters,
    packed,
    picture,
    start_world,
)
from tests.support.tars import contents, tar

pytestmark = pytest.mark.integration

CORRUPT = b"\xff\xd8\xff\xe0 no picture at all"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_world() as world:
        yield world


@pytest.fixture
def bucket(world: World) -> Files:
    return world.bucket()


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(place: Files, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(place.get(name)))


def hub(shard: bytes, tmp_path: Any) -> datasets.Dataset:
    """What Hugging Face's library reads."""
    path = tmp_path / f"{uuid.uuid4().hex}.parquet"
    path.write_bytes(shard)
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )


def first_tags(tags: list[Any] | None) -> list[str | None]:
    """Of which picture each list of tags is; None for none."""
    return [None if not each else each[0] for each in tags or ()]


# ---------------------------------------------------------------- Parquet


def hugging_face_shard(tmp_path: Any, name: str, *, plain: bool = False) -> bytes:
    """Four pictures, a corrupt one, none, and one that has tags already."""
    features = datasets.Features(
        {
            "image": datasets.Value("binary") if plain else datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "when": datasets.Value("timestamp[ms]"),
            META: {"origin": datasets.Value("string"), FIELD: [[datasets.Value("string")]]},
        }
    )
    data = [*(picture(f"{name}-{number}") for number in range(4)), CORRUPT, None, picture(f"{name}-tagged")]
    columns = {
        "image": [
            each if plain or each is None else {"bytes": each, "path": f"{number}.png"}
            for number, each in enumerate(data)
        ],
        "label": [0, 1, 0, 1, 0, 1, 0],
        "when": list(range(7)),
        META: [{"origin": "x", FIELD: None}] * 6 + [{"origin": "x", FIELD: [["known"]]}],
    }
    path = tmp_path / "made.parquet"
    if plain:
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, path, row_group_size=3)
    else:
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path), batch_size=3)
    return path.read_bytes()


@pytest.mark.parametrize("plain", [False, True], ids=["Image", "binary"])
def test_parquet_with_embedded_images(world, bucket, tmp_path, plain):
    name = f"hub-{plain}"
    source = hugging_face_shard(tmp_path, name, plain=plain)
    bucket.put("in/a.parquet", source)
    given = {"image_key": "image", "max_error_rate": 0.5}

    summary, asked = world.tag_counted(bucket / "in", bucket / "side", **given)

    counts = {name: summary[name] for name in ("rows_in", "ok", "skipped", "failed", "requests")}
    assert counts == {"rows_in": 7, "ok": 5, "skipped": 1, "failed": 1, "requests": 4}
    assert asked == 4
    assert letters(bucket / "side", "a.parquet") == [(4, "media_corrupt")]
    side = table(bucket / "side", "a.parquet").to_pylist()
    assert [(row["key"], row["row"]) for row in side] == [(None, number) for number in range(7)]
    mine = [tag_of(picture(f"{name}-{number}")) for number in range(4)]
    assert [row[META] and first_tags(row[META][FIELD]) for row in side] == [
        *([each] for each in mine),
        None,
        [None],
        None,
    ]
    assert world.tag_counted(bucket / "in", bucket / "side", **given)[1] == 0

    # What one form was answered is known in the other.
    full = {**given, "output": "full", "reuse_from": str(bucket / "side")}
    summary, asked = world.tag_counted(bucket / "in", bucket / "full", **full)
    assert (asked, summary["cached"], summary["failed"], summary["skipped"]) == (0, 4, 1, 1)
    written, read = bucket.get("full/a.parquet"), pq.read_table(io.BytesIO(source))
    again = table(bucket, "full/a.parquet")
    assert again.schema.remove_metadata() == read.schema.remove_metadata()
    assert (
        pq.ParquetFile(io.BytesIO(written)).num_row_groups
        == pq.ParquetFile(io.BytesIO(source)).num_row_groups
    )
    assert again.drop_columns([META]) == read.drop_columns([META])
    tags = [first_tags(row[META][FIELD]) for row in again.to_pylist()]
    assert tags == [*([each] for each in mine), [], [None], ["known"]]
    loaded, before = hub(written, tmp_path), hub(source, tmp_path)
    assert loaded.features == before.features
    if not plain:
        assert loaded.features["image"] == datasets.Image()
        assert loaded[2]["image"].tobytes() == Image.open(io.BytesIO(picture(f"{name}-2"))).tobytes()
    assert world.tag_counted(bucket / "in", bucket / "full", **full)[1] == 0


def test_parquet_with_references_and_pictures_replaced_behind_it(world, bucket, tmp_path):
    for number in range(5):
        bucket.put(f"in/img/{number}.png", picture(f"ref-{number}"))
    columns = {
        "images": pa.array(
            [["img/0.png"], ["img/1.png", "img/2.png"], ["img/3.png"], [], None, ["img/9.png"]]
        ),
        "text": pa.array(["a", "b", None, "d", "e", "f"], pa.large_string()),
        "score": pa.array([1, 2, 3, 4, 5, 6], pa.uint8()),
    }
    schema = pa.schema(
        [pa.field(name, each.type, metadata={"about": name}) for name, each in columns.items()],
        metadata={"owner": "somebody"},
    )
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), stream)
    bucket.put("in/day/a.parquet", stream.getvalue())
    roots = [f"{bucket}/in"]

    summary, asked = world.tag_counted(bucket / "in", bucket / "out", media_roots=roots)

    assert (asked, summary["rows_in"], summary["failed"]) == (4, 6, 1)
    assert letters(bucket / "out", "day/a.parquet") == [(5, "media_missing")]
    out = table(bucket, "out/day/a.parquet")
    assert out.schema.metadata[b"owner"] == b"somebody"
    for name in columns:
        assert out.schema.field(name) == schema.field(name)
        assert out.schema.field(name).metadata == schema.field(name).metadata
    assert out.drop_columns([META]) == pa.table(columns, schema=schema)
    by_row = [first_tags((row[META] or {}).get(FIELD)) for row in out.to_pylist()]
    tags = [tag_of(picture(f"ref-{number}")) for number in range(4)]
    assert by_row == [[tags[0]], [tags[1], tags[2]], [tags[3]], [None], [None], []]
    dataset = hub(bucket.get("out/day/a.parquet"), tmp_path)
    assert dataset[1][META][FIELD][1][0] == tags[2]
    assert world.tag_counted(bucket / "in", bucket / "out", media_roots=roots)[1] == 0

    bucket.put("in/img/2.png", picture("ref-new"))
    bucket.put("in/img/9.png", picture("ref-9"))
    summary, asked = world.tag_counted(bucket / "in", bucket / "out", media_roots=roots)

    assert (asked, summary["failed"]) == (2, 0)
    rows = table(bucket, "out/day/a.parquet").to_pylist()
    assert first_tags(rows[1][META][FIELD]) == [tags[1], tag_of(picture("ref-new"))]
    assert first_tags(rows[5][META][FIELD]) == [tag_of(picture("ref-9"))]


# ---------------------------------------------------------------- WebDataset


def webdataset_shard(name: str) -> bytes:
    """Pictures with texts and fields, a corrupt one, a sample that can't be read, and one without a picture."""
    return tar(
        ("0.png", picture(f"{name}-0")),
        ("0.txt", "ein Bär".encode()),
        ("1.json", b'{"id": 1, "__dj__meta__": {"origin": "x"}}'),
        ("1.png", picture(f"{name}-1")),
        ("1.cls", b"7"),
        ("2.png", CORRUPT),
        ("3.json", b"{"),
        ("3.png", picture(f"{name}-3")),
        ("4.txt", b"only text"),
        ("5.json", b'{"__dj__meta__": {"image_tags": [["known"]]}}'),
        ("5.png", picture(f"{name}-5")),
        ("folder/6.front.png", picture(f"{name}-6")),
        ("folder/6.back.png", picture(f"{name}-7")),
    )


def unpacked(data: bytes, suffix: str) -> bytes:
    import gzip

    if suffix == ".tar":
        return data
    return (
        gzip.decompress(data)
        if "gz" in suffix
        else zstandard.ZstdDecompressor().decompressobj().decompress(data)
    )


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_webdataset_tars(world, bucket, tmp_path, suffix):
    name = f"w{suffix}"
    plain = webdataset_shard(name)
    bucket.put(f"in/a{suffix}", packed(plain, suffix))

    summary, asked = world.tag_counted(bucket / "in", bucket / "side")

    counts = {name: summary[name] for name in ("rows_in", "ok", "skipped", "failed", "requests")}
    assert counts == {"rows_in": 7, "ok": 4, "skipped": 1, "failed": 2, "requests": 4}
    assert asked == 4
    assert letters(bucket / "side", f"a{suffix}") == [(2, "media_corrupt"), (3, "malformed_row")]
    assert (bucket / "side").names() == ["a.parquet"]
    side = table(bucket, "side/a.parquet").to_pylist()
    assert [row["key"] for row in side] == ["0", "1", "2", "3", "4", "5", "folder/6"]
    tags = {number: tag_of(picture(f"{name}-{number}")) for number in (0, 1, 6, 7)}
    by_row = [row[META] and first_tags(row[META][FIELD]) for row in side]
    assert by_row == [[tags[0]], [tags[1]], None, None, [None], None, [tags[6], tags[7]]]
    assert world.tag_counted(bucket / "in", bucket / "side")[1] == 0

    # In full, one step's destination is the next one's source.
    full = {"output": "full", "reuse_from": str(bucket / "side")}
    assert world.tag_counted(bucket / "in", bucket / "full", **full)[1] == 0
    written = bucket.get(f"full/a{suffix}")
    kept = [(each, data) for each, data in contents(unpacked(written, suffix)) if not each.endswith(".json")]
    assert kept == [(each, data) for each, data in contents(plain) if not each.endswith(".json")]
    summary, asked = world.tag_counted(bucket / "full", bucket / "second", tag_field_name="other", **full)
    # The sample that had tags before has none under the other name.
    assert (asked, summary["ok"], summary["cached"], summary["failed"]) == (1, 2, 3, 2)
    assert world.tag_counted(bucket / "full", bucket / "second", tag_field_name="other", **full)[1] == 0

    path = tmp_path / f"read{suffix if suffix != '.tar.zst' else '.tar'}"
    last = bucket.get(f"second/a{suffix}")
    path.write_bytes(unpacked(last, suffix) if suffix == ".tar.zst" else last)
    samples = {each["__key__"]: each for each in webdataset.WebDataset(str(path), shardshuffle=False)}
    assert list(samples) == ["0", "1", "2", "3", "4", "5", "folder/6"]
    assert samples["0"]["txt"].decode() == "ein Bär"
    first, second = json.loads(samples["1"]["json"]), json.loads(samples["folder/6"]["json"])
    assert (first["id"], first[META]["origin"], samples["1"]["cls"]) == (1, "x", b"7")
    assert first_tags(first[META][FIELD]) == first_tags(first[META]["other"]) == [tags[1]]
    assert first_tags(second[META]["other"]) == [tags[6], tags[7]]
    assert json.loads(samples["5"]["json"])[META][FIELD] == [["known"]]
    assert samples["3"]["json"] == b"{"
