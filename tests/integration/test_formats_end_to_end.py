"""Every format and store through the operators' ``execute``: what is written, who can read it, and what it costs.

Whether something was asked is told by the endpoint itself, which also says of which picture an answer is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard
from airflow.sdk.exceptions import AirflowFailException
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from airflow_vlm_provider.cli.definition import get_vlm_cli_commands
from airflow_vlm_provider.ledger.plans import PlanReference, save_plan
from airflow_vlm_provider.operators.export import ExportDatasetOperator
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from demo.s3_server import start_s3
from tests.support.images import encode
from tests.support.places import Files
from tests.support.stub_endpoint import start_stub, tag_of
from tests.support.tars import contents, tar
from tests.support.task_processes import start_tasks

pytestmark = pytest.mark.integration

META, FIELD = "__dj__meta__", "image_tags"
STEP = "image_tagging"
CORRUPT = b"\xff\xd8\xff\xe0 no picture at all"
CONNECTION = "AIRFLOW_CONN_VLM_DEFAULT"


def picture(name: object) -> bytes:
    """A picture of its own for every name."""
    return encode(Image.frombytes("RGB", (16, 16), random.Random(str(name)).randbytes(768)), "PNG")


class World:
    """An S3 server and an endpoint, and operators that run against them as a task would."""

    def __init__(self, s3: Any, stub: Any) -> None:
        self.s3, self.stub = s3, stub
        self.client = s3.client()
        extra = {"model": "stub-vlm", "max_concurrency": 4}
        self.environment = {
            CONNECTION: json.dumps({"conn_type": "vlm", "host": stub.base_url, "extra": extra}),
            "AIRFLOW_CONN_AWS_DEFAULT": s3.airflow_connection_json(),
            "AIRFLOW__VLM__JOURNAL_FLUSH_ANSWERS": "4",
        }

    def bucket(self) -> Files:
        name = f"b-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return Files(f"s3://{name}", s3_client=self.s3.client)

    def asked(self) -> int:
        return int(self.stub.stats()["requests"])

    def tag(self, source: object, destination: object, **given: Any) -> dict[str, Any]:
        given = {"source": str(source), "destination": str(destination), "max_error_rate": 1.0, **given}
        return ImageTaggingVLMOperator(task_id="tag", **given).execute(context())

    def tag_counted(self, *places: object, **given: Any) -> tuple[dict[str, Any], int]:
        """What the task returned, and how many requests reached the endpoint meanwhile."""
        before = self.asked()
        return self.tag(*places, **given), self.asked() - before


def context(**pushed: Any) -> Any:
    ti = SimpleNamespace(
        dag_id="d", run_id="r", task_id="tag", map_index=-1, try_number=1, xcom_push=lambda **given: None
    )
    return {"ti": ti, "outlet_events": {}}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_s3() as s3, start_stub() as stub, pytest.MonkeyPatch.context() as patch:
        world = World(s3, stub)
        for name, value in world.environment.items():
            patch.setenv(name, value)
        yield world


@pytest.fixture
def bucket(world: World) -> Files:
    return world.bucket()


@pytest.fixture(autouse=True)
def _as_new(world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.stub.set(image_faults={}, latency=0.0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def manifest(place: Files, shard: str) -> dict[str, Any]:
    return json.loads(place.get(f"_vlm/{shard}/{STEP}/manifest.json"))


def letters(place: Files, shard: str) -> list[tuple[int, str]]:
    lines = place.get(f"_vlm/{shard}/{STEP}/errors.jsonl").splitlines()
    return [(each["row"], each["kind"]) for each in map(json.loads, lines)]


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


def packed(data: bytes, suffix: str) -> bytes:
    import gzip

    return {
        ".tar": lambda: data,
        ".tar.gz": lambda: gzip.compress(data),
        ".tgz": lambda: gzip.compress(data),
    }.get(suffix, lambda: zstandard.ZstdCompressor().compress(data))()


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


# ---------------------------------------------------------------- all formats together


def mixed_source(place: Files, tmp_path: Any, name: str, *, rows: int = 6) -> list[str]:
    """A shard in each of four formats, with pictures of their own; returns the shards' names."""
    pictures = {
        form: [picture(f"{name}-{form}-{number}") for number in range(rows)] for form in ("t", "h", "r", "j")
    }
    place.put(
        "t.tar.gz", packed(tar(*((f"{i}.png", data) for i, data in enumerate(pictures["t"]))), ".tar.gz")
    )
    hugging = datasets.Dataset.from_dict(
        {"images": [[{"bytes": data, "path": None}] for data in pictures["h"]]},
        features=datasets.Features({"images": [datasets.Image()]}),
    )
    hugging.to_parquet(str(tmp_path / "h.parquet"), batch_size=2)
    place.put("h.parquet", (tmp_path / "h.parquet").read_bytes())
    for form in ("r", "j"):
        for number, data in enumerate(pictures[form]):
            place.put(f"img/{form}{number}.png", data)
    references = {form: [[f"img/{form}{number}.png"] for number in range(rows)] for form in ("r", "j")}
    stream = io.BytesIO()
    pq.write_table(pa.table({"images": references["r"]}), stream, row_group_size=2)
    place.put("r.parquet", stream.getvalue())
    lines = "".join(json.dumps({"images": each}) + "\n" for each in references["j"])
    place.put("j.jsonl.zst", packed(lines.encode(), ".zst"))
    return ["h.parquet", "j.jsonl.zst", "r.parquet", "t.tar.gz"]


def test_the_same_picture_in_any_format_is_asked_about_once(world, bucket):
    same = picture("in-all-formats")
    bucket.put("in/a.tar", tar(("x.png", same)))
    stream = io.BytesIO()
    pq.write_table(
        pa.table({"images": [[{"bytes": same, "path": "x.png"}], [{"bytes": same, "path": None}]]}), stream
    )
    bucket.put("in/b.parquet", stream.getvalue())
    bucket.put("in/c.jsonl", b'{"images": ["x/y.png", "x/y.png"]}\n')
    bucket.put("in/x/y.png", same)
    summary, asked = world.tag_counted(bucket / "in", bucket / "out")
    assert (asked, summary["rows_in"], summary["requests"], summary["failed"]) == (1, 4, 1, 0)


@pytest.mark.parametrize("output", [None, "full"])
def test_dead_letters_of_every_format_are_redriven_and_merged(world, bucket, tmp_path, output):
    name = f"redriven-{output}"
    shards = mixed_source(bucket / "in", tmp_path, name, rows=4)
    refused = {tag_of(picture(f"{name}-{form}-2")).removeprefix("img-"): "refusal" for form in "thrj"}
    world.stub.set(image_faults=refused)
    given = {"output": output, "try_num": 1}
    summary = world.tag(bucket / "in", bucket / "out", **given)
    assert (summary["rows_in"], summary["failed"], summary["ok"]) == (16, 4, 12)
    for shard in shards:
        assert letters(bucket / "out", shard) == [(2, "refused")]
    world.stub.set(image_faults={})
    before = world.asked()

    some = world.tag(bucket / "in", bucket / "out", failed_only=True, shards=["t.tar.gz"], **given)
    rest = RedriveOperator(task_id="r", destination=str(bucket / "out")).execute(context())

    assert world.asked() - before == 4
    assert (some["requests"], some["failed"], some["rows_in"]) == (1, 0, 4)
    assert (rest["redriven"], rest["recovered"], rest["shards"], rest["rows_in"]) == (3, 3, 3, 12)
    world.tag(bucket / "in", bucket / "undisturbed", overwrite=True, **given)
    assert (bucket / "out").everything() == (bucket / "undisturbed").everything()
    assert all(manifest(bucket / "out", shard)["failed"] == 0 for shard in shards)
    assert world.tag_counted(bucket / "in", bucket / "out", **given)[1] == 0


@pytest.fixture(scope="module")
def tasks(world, tmp_path_factory):
    with start_tasks(world.environment, tmp_path_factory.mktemp("tasks")) as tasks:
        yield tasks


@pytest.mark.parametrize("output", [None, "full"])
def test_killed_in_the_middle_every_format_ends_as_if_it_had_not_been(world, bucket, tasks, tmp_path, output):
    shards = mixed_source(bucket / "in", tmp_path, f"killed-{output}", rows=10)
    world.stub.set(latency=0.1)
    before = world.asked()
    task = tasks.start(source=f"{bucket}/in", destination=f"{bucket}/out", output=output)
    while world.asked() - before < 28 and not task.ended():
        time.sleep(0.01)
    os.kill(task.pid, signal.SIGKILL)
    assert task.wait() == -signal.SIGKILL, task.said()
    world.stub.set(latency=0)
    summary = world.tag(bucket / "in", bucket / "out", output=output)
    assert (summary["rows_in"], summary["failed"]) == (40, 0)
    assert summary["cached"] > 0
    world.tag(bucket / "in", bucket / "undisturbed", output=output)
    assert (bucket / "out").everything() == (bucket / "undisturbed").everything()
    assert len((bucket / "out").names()) == len(shards)
    assert world.tag_counted(bucket / "in", bucket / "out", output=output)[1] == 0


# ---------------------------------------------------------------- what must not be


@pytest.mark.parametrize(
    ("shards", "given"),
    [
        (("a.tar", "a.tar.gz"), {}),
        (("a.tar", "a.parquet"), {}),
        (("a.jsonl", "a.jsonl.gz"), {"output": "sidecar"}),
        (("a.TAR", "a.tar"), {}),
    ],
)
def test_two_shards_never_have_one_output(world, bucket, shards, given):
    for name in shards:
        bucket.put(f"in/{name}", b"never read")
    with pytest.raises(AirflowFailException) as refused:
        world.tag(bucket / "in", bucket / "out", **given)
    assert all(repr(name) in str(refused.value) for name in shards)
    assert "output='full'" in str(refused.value)
    assert (bucket / "out").everything() == {}


def test_a_table_beside_a_tar_is_in_nobodys_way_until_it_is_a_shard_that_is_done(world, bucket):
    bucket.put("in/a.tar", tar(("x.png", picture("beside"))))
    bucket.put("in/a.parquet", b"what img2dataset writes beside its tars")
    assert world.tag(bucket / "in", bucket / "out", shards=["a.tar"])["ok"] == 1
    assert (bucket / "out").names() == ["a.parquet"]
    with pytest.raises(AirflowFailException, match=r"'a\.parquet' and 'a\.tar' would be one file"):
        world.tag(bucket / "in", bucket / "out", shards=["a.parquet"])


def test_shards_of_one_stem_are_written_in_full_side_by_side(world, bucket):
    bucket.put("in/a.tar", tar(("x.png", picture("stem-1"))))
    bucket.put("in/a.tar.gz", packed(tar(("x.png", picture("stem-2"))), ".gz"[:0] + ".tar.gz"))
    bucket.put("in/a.jsonl", b"{}\n")
    summary = world.tag(bucket / "in", bucket / "out", output="full")
    assert (summary["shards"], (bucket / "out").names()) == (3, ["a.jsonl", "a.tar", "a.tar.gz"])
    # Lines keep their name, and so are in nobody's way.
    (bucket / "in").store.delete("a.tar.gz")
    world.tag(bucket / "in", bucket / "side")
    assert (bucket / "side").names() == ["a.jsonl", "a.parquet"]


def test_a_sidecar_is_no_source_of_a_step_but_one_of_an_export(world, bucket):
    bucket.put("in/a.tar", tar(("x.png", picture("sidecar"))))
    world.tag(bucket / "in", bucket / "side")
    with pytest.raises(AirflowFailException, match=r"the sidecar of 'a\.tar'.*output='full'"):
        world.tag(bucket / "side", bucket / "out", tag_field_name="other")
    assert (bucket / "out").names() == []
    summary = ExportDatasetOperator(
        task_id="e",
        source=str(bucket / "side"),
        destination=f"{bucket}/sets/pairs.jsonl",
        format="pairs",
        text_field=f"{META}.{FIELD}",
        image_key="key",
    ).execute(context())
    assert summary["records"] == 1
    assert json.loads(bucket.get("sets/pairs.jsonl"))["image"] == "x"


# ---------------------------------------------------------------- other stores


@pytest.fixture(params=["memory", "sftp"])
def elsewhere(request, tmp_path, monkeypatch):
    """A place that is only reached by fsspec: one where a put is atomic, and one that moves files."""

    class Moving(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("sftp://server"))

    def filesystem(scheme: str, *_: Any, **__: Any) -> Any:
        return MemoryFileSystem() if scheme == "memory" else Moving()

    monkeypatch.setattr("airflow.sdk.io.store._STORE_CACHE", {})
    monkeypatch.setattr("airflow.sdk.io.get_fs", filesystem)
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"sftp://server{tmp_path}"
    return Files(root, filesystem=lambda uri: filesystem(uri.partition(":")[0]))


def test_all_formats_on_other_stores(world, elsewhere, tmp_path):
    source, out = elsewhere / "in", elsewhere / "out"
    shards = mixed_source(source, tmp_path, f"elsewhere-{elsewhere}", rows=4)
    plan = PlanShardsOperator(task_id="plan", source=str(source), max_tasks=2)
    groups = plan.execute(context())
    assert sorted(name for group in groups for name in group) == shards

    sums = [world.tag_counted(source, out, shards=group) for group in groups]

    assert sum(asked for _, asked in sums) == sum(each["rows_in"] for each, _ in sums) == 16
    assert out.names() == ["h.parquet", "j.jsonl.zst", "r.parquet", "t.parquet"]
    assert world.tag_counted(source, out)[1] == 0
    source.put("img/j1.png", picture("elsewhere-new"))
    summary, asked = world.tag_counted(source, out)
    assert (asked, summary["failed"]) == (1, 0)
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(out.get("j.jsonl.zst")).splitlines()
    assert json.loads(lines[1])[META][FIELD][0][0] == tag_of(picture("elsewhere-new"))
    # From there to S3 and back, what is known stays known.
    bucket = world.bucket()
    assert world.tag_counted(source, bucket / "out", reuse_from=str(out))[1] == 0
    for name, data in source.everything().items():
        bucket.put(f"in/{name}", data)
    assert world.tag_counted(bucket / "in", elsewhere / "again", reuse_from=f"{bucket}/out")[1] == 0
    assert (elsewhere / "again").everything() == out.everything()


# ---------------------------------------------------------------- exports


def test_exports_from_s3_and_from_a_plan(world, bucket, tmp_path):
    for number in range(3):
        bucket.put(f"in/day 1/img/{number}.png", picture(f"export-{number}"))
    rows = [{"id": f"r{number}", "images": [f"img/{number}.png"]} for number in range(3)]
    rows.append({"id": "two", "images": ["img/0.png", "img/1.png"]})
    rows.append({"id": "gone", "images": ["img/9.png"]})
    bucket.put("in/day 1/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode() + b"{\n")
    bucket.put("in/day 2/b.tar.gz", packed(tar(("k/x.png", picture("export-4"))), ".tar.gz"))
    world.tag(bucket / "in", bucket / "out", output="full")
    groups = [["day 1/a.jsonl"], ["day 2/b.tar.gz"]]
    name = save_plan((bucket / "out").store, groups)
    plan = [str(PlanReference(f"{bucket}/out/", name, number, "a few")) for number in range(2)]

    def export(file: str, form: str, **given: Any) -> dict[str, Any]:
        given = {"source": f"{bucket}/out", "text_field": f"{META}.{FIELD}", **given}
        target = f"{bucket}/sets/{file}"
        return ExportDatasetOperator(task_id="e", format=form, destination=target, **given).execute(context())

    base = f"{bucket}/in"
    whole = export("llava.json", "llava", image_base=base)
    # The row that can't be parsed stands in no output.
    assert (whole["rows"], whole["records"], whole["rows_without_caption"]) == (6, 6, 1)
    llava = json.loads(bucket.get("sets/llava.json"))
    assert [each["id"] for each in llava] == ["r0", "r1", "r2", "two_0", "two_1", "k/x"]
    assert llava[4]["image"] == f"{base}/day 1/img/1.png"
    assert llava[4]["conversations"][1]["value"].startswith(tag_of(picture("export-1")))
    assert llava[5]["image"] == f"{base}/day 2/k/x.png"
    for each in llava[:5]:
        assert bucket.get(each["image"].removeprefix(f"{bucket}/")), "an image that is there"

    assert export("planned.json", "coco", shards=plan)["records"] == 6
    coco = json.loads(bucket.get("sets/planned.json"))
    by_id = {each["id"]: each["file_name"] for each in coco["images"]}
    assert [by_id[each["image_id"]] for each in coco["annotations"]][3:] == [
        *("day 1/img/0.png", "day 1/img/1.png", "day 2/k/x.png")
    ]
    assert export("one.tsv", "pairs", shards=plan[1])["records"] == 1
    path = tmp_path / "one.tsv"
    path.write_bytes(bucket.get("sets/one.tsv"))
    (pair,) = pandas.read_csv(path, sep="\t").to_dict("records")
    assert (pair["image"], pair["text"].split(", ")[0]) == ("day 2/k/x.png", tag_of(picture("export-4")))


# ---------------------------------------------------------------- the ledger's commands


def ledger(command: str, *argv: str) -> dict[str, Any]:
    """What ``airflow vlm ledger`` prints for machines."""
    (vlm,) = get_vlm_cli_commands()
    (group,) = [each for each in vlm.subcommands if each.name == "ledger"]
    (chosen,) = [each for each in group.subcommands if each.name == command]
    parser = argparse.ArgumentParser()
    for each in chosen.args:
        each.add_to_parser(parser)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        chosen.func(parser.parse_args([*argv, "--output", "json"]))
    return json.loads(out.getvalue())


def test_after_several_runs_show_tells_the_truth_and_prune_leaves_what_is_needed(
    world, tasks, tmp_path, monkeypatch
):
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")
    source, out = Files(f"file://{tmp_path}/in"), Files(f"file://{tmp_path}/out")
    shards = mixed_source(source, tmp_path, "pruned", rows=12)
    refused = [tag_of(picture(f"pruned-{form}-3")).removeprefix("img-") for form in "hj"]
    world.stub.set(image_faults=dict.fromkeys(refused, "refusal"))
    old = {"input_template": "What is it?", "try_num": 1}
    new = {"input_template": "What do you see?", "try_num": 1}
    world.tag(source, out, **old)
    world.stub.set(latency=0.05)
    before = world.asked()
    # An attempt that never committed, whose answers nobody refers to.
    task = tasks.start(source=str(source), destination=str(out), **new)
    while world.asked() - before < 30 and not task.ended():
        time.sleep(0.01)
    os.kill(task.pid, signal.SIGKILL)
    assert task.wait() == -signal.SIGKILL, task.said()
    world.stub.set(latency=0)
    world.tag(source, out, **new)
    world.tag(source, out, overwrite=True, **old)
    world.tag(source, out, **new)

    shown = ledger("show", str(out))
    assert [each["shard"] for each in shown["shards"]] == shards
    assert (shown["totals"][STEP]["rows_in"], shown["totals"][STEP]["failed"]) == (48, 2)
    for shard in shards:
        one = ledger("show", f"{out}/{shard}")
        (step,) = one["steps"]
        assert one["shard"] == shard
        assert step["manifest"] == manifest(out, shard)
        assert dict(step["dead_letters"]) == step["manifest"]["kinds"]
        failed = [] if step["manifest"]["errors"] is None else [row for row, _ in letters(out, shard)]
        assert [each["row"] for each in step["first_dead_letters"]] == failed
        assert len(failed) == step["manifest"]["failed"]
        listed = out.names(f"_vlm/{shard}/{STEP}/journal")
        assert [f"_vlm/{shard}/{STEP}/{each['name']}" for each in step["segments"]] == listed
        referred = [each["name"] for each in step["segments"] if each["referred"]]
        assert referred == sorted(step["manifest"]["journal"])
        held = sum(each["answers"] for each in step["segments"] if each["referred"])
        assert held >= step["manifest"]["rows_in"]

    assert ledger("prune", str(out), "--older-than", "30")["segments"] == 0, "nothing is that old"
    long_ago = time.time() - 40 * 86400
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    would = ledger("prune", str(out), "--older-than", "30", "--dry-run")
    before_pruning = out.names("_vlm")
    pruned = ledger("prune", str(out), "--older-than", "30")
    assert {**would, "dry_run": False} == pruned
    assert pruned["segments"] > 0
    gone = set(before_pruning) - set(out.names("_vlm"))
    assert gone == {name for each in pruned["shards"] for name in each["segments"]}
    assert pruned["left_as_they_are"] == []

    assert world.tag_counted(source, out, **new)[1] == 0
    again = world.tag(source, out, overwrite=True, **new)
    assert (again["requests"], again["rows_in"]) == (0, 48)
    # Other shards find them, too.
    everything = {f"moved/{name}": data for name, data in source.everything().items()}
    for name, data in everything.items():
        source.put(name, data)
    moved = world.tag(source / "moved", out, **new)
    assert (moved["requests"], moved["rows_in"], moved["cached"]) == (0, 48, 46)
