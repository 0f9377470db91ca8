"""Outputs as what comes next meets them: which may stand side by side, be a source, or be exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas
import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.ledger.plans import PlanReference, save_plan
from airflow_vlm_provider.operators.export import ExportDatasetOperator
from tests.support.places import Files
from tests.support.stub_endpoint import tag_of
from tests.support.tagging_world import (
    FIELD,
    META,
    World,
    context,
    packed,
    picture,
    start_world,
)
from tests.support.tars import tar

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_world() as world:
        yield world


@pytest.fixture
def bucket(world: World) -> Files:
    return world.bucket()


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
