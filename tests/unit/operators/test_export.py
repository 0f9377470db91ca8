from __future__ import annotations

import csv
import json
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.operators.export import ExportDatasetOperator
from airflow_vlm_provider.operators.parameters import ParameterError
from airflow_vlm_provider.shards.sidecar import SidecarWriter
from tests.support.tars import read, tar


def write_rows(path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def export(tmp_path, name="out.jsonl", **kwargs: Any) -> tuple[dict[str, Any], Any]:
    kwargs.setdefault("format", "pairs")
    source = kwargs.pop("source", str(tmp_path / "data"))
    destination = tmp_path / "sets" / name
    operator = ExportDatasetOperator(task_id="x", source=source, destination=str(destination), **kwargs)
    return operator.execute({}), destination


def pairs(path) -> list[tuple[str, str]]:
    return [(each["image"], each["text"]) for each in map(json.loads, path.read_text().splitlines())]


def test_all_shards_become_one_file_and_every_row_is_accounted_for(tmp_path, capsys):
    write_rows(
        tmp_path / "data" / "b" / "1.jsonl",
        {"images": ["img/1.jpg"], "text": "one"},
        "{broken\n",
        {"images": [], "text": "no image"},
    )
    write_rows(
        tmp_path / "data" / "a.jsonl",
        {"images": ["img/2.jpg", "/abs/3.jpg"], "text": "two"},
        {"images": ["img/4.jpg"]},
        {"images": ["img/5.jpg"], "text": [["a"], ["b"]]},
        {"images": ["img/6.jpg", "img/7.jpg"], "text": [["a", "c"], []]},
    )
    write_rows(tmp_path / "data" / "_vlm" / "x.jsonl", {"images": ["no.jpg"], "text": "no"})
    summary, path = export(tmp_path)
    assert pairs(path) == [
        ("img/2.jpg", "two"),
        ("/abs/3.jpg", "two"),
        ("img/6.jpg", "a, c"),
        ("b/img/1.jpg", "one"),
    ]
    assert summary == {
        "shards": 2,
        "rows": 7,
        "records": 4,
        "rows_unreadable": 1,
        "rows_without_image": 1,
        "rows_without_caption": 1,
        "rows_mismatched": 1,
        "images_without_caption": 1,
        "format": "pairs",
        "source": f"file://{tmp_path}/data/",
        "destination": f"file://{path}",
    }
    assert "Left out of the export: rows_unreadable 1, rows_without_image 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format", "name"), [("llava", "a.json"), ("coco", "a.json"), ("pairs", "a.jsonl"), ("pairs", "a.TSV")]
)
def test_each_format_is_written(tmp_path, format, name):
    tags = {"__dj__meta__": {"image_tags": [["red", "cat"]]}}
    write_rows(tmp_path / "data" / "a.jsonl", {"images": ["1.jpg"], "text": "<__dj__image>", **tags})
    summary, path = export(
        tmp_path,
        name,
        format=format,
        text_field="__dj__meta__.image_tags",
        image_base="s3://b/raw/",
        prompt="Tags?" if format == "llava" else None,
    )
    text = path.read_text()
    assert summary["records"] == 1
    if format == "llava":
        (conversation,) = json.loads(text)
        assert conversation["image"] == "s3://b/raw/1.jpg"
        assert [each["value"] for each in conversation["conversations"]] == ["<image>\nTags?", "red, cat"]
    elif format == "coco":
        dataset = json.loads(text)
        assert dataset["images"] == [{"id": 1, "file_name": "s3://b/raw/1.jpg"}]
        assert dataset["annotations"] == [{"id": 1, "image_id": 1, "caption": "red, cat"}]
        assert "airflow-provider-vlm" in dataset["info"]["description"]
    elif name.endswith("jsonl"):
        assert pairs(path) == [("s3://b/raw/1.jpg", "red, cat")]
    else:
        assert list(csv.reader(text.splitlines(), dialect="excel-tab"))[1] == ["s3://b/raw/1.jpg", "red, cat"]


def test_llavas_own_tokens_are_taken_out_of_answers(tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", {"images": ["1.jpg"], "text": "An <image> of <video>."})
    _, path = export(tmp_path, "a.json", format="llava")
    assert json.loads(path.read_text())[0]["conversations"][1]["value"] == "An of ."


def test_members_of_a_tar_are_named_as_unpacking_it_would(tmp_path):
    path = tmp_path / "data" / "day" / "a.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(
        tar(
            ("train/1.jpg", b"1"),
            ("train/1.txt", b"one"),
            ("train/2.json", b'{"images": ["2.jpg"], "text": "two"}'),
        )
    )
    _, written = export(tmp_path, image_base="/base")
    assert pairs(written) == [("/base/day/train/1.jpg", "one"), ("/base/day/2.jpg", "two")]


def test_parquet_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    table = pa.table({"images": [["1.jpg"]], "m": ['{"tags": [["a", "b"]]}']})
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    _, path = export(tmp_path, text_field="m.tags")
    assert pairs(path) == [("1.jpg", "a, b")]


def test_named_shards_only(tmp_path):
    for name in "abc":
        write_rows(tmp_path / "data" / f"{name}.jsonl", {"pic": f"{name}.jpg", "text": name})
    summary, path = export(tmp_path, shards=["c.jsonl", "a.jsonl"], image_key="pic")
    assert pairs(path) == [("c.jpg", "c"), ("a.jpg", "a")]
    assert summary["shards"] == 2
    summary, _ = export(tmp_path, source=str(tmp_path / "data" / "b.jsonl"), image_key="pic")
    assert (summary["shards"], summary["records"]) == (1, 1)


def test_an_export_of_nothing_fails_and_writes_nothing(tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", {"images": ["1.jpg"], "caption": "c"}, {"text": "t"})
    with pytest.raises(AirflowFailException, match=r"Not one of the 2 rows .* text_field='text'"):
        export(tmp_path)
    assert not (tmp_path / "sets" / "out.jsonl").exists()
    summary, path = export(tmp_path, text_field="caption")
    assert (summary["records"], path.exists()) == (1, True)


def test_empty_shards_make_an_empty_file(tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl")
    summary, path = export(tmp_path, "out.json", format="coco")
    assert (summary["rows"], json.loads(path.read_text())["images"]) == (0, [])


def test_a_shard_that_cannot_be_read_leaves_the_old_file(tmp_path):
    data = tar(("1.jpg", b"1"), ("1.txt", b"one"), ("2.jpg", b"2"), ("2.txt", b"two"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(data)
    _, path = export(tmp_path)
    before = path.read_bytes()
    (tmp_path / "data" / "a.tar").write_bytes(data[:2600])
    with pytest.raises(ShardError, match=r"data/a\.tar can't be read"):
        export(tmp_path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "yolo"}, "format='yolo' is not known. Use one of llava, coco, pairs"),
        ({"destination": "out/"}, r"must be one file, whose name ends in \.json "),
        ({"destination": "out.jsonl"}, r"must be one file, whose name ends in \.json "),
        ({"destination": None}, "must be one file"),
        ({"format": "pairs"}, r"ends in \.jsonl or \.tsv for format='pairs'"),
        ({"format": "pairs", "destination": "data/sets/a.jsonl"}, "lies inside source"),
        ({"format": "pairs", "source": "a.jsonl", "destination": "a.jsonl"}, "is where source="),
        ({"text_field": ""}, "text_field='' must be a field's name"),
        ({"image_key": None}, "image_key=None must be a field's name"),
        ({"image_base": 3}, "image_base=3 must be a URI"),
        ({"prompt": 3}, "prompt=3 must be a string"),
        ({"format": "coco", "prompt": "?"}, "goes with format='llava' only"),
        ({"shards": [1]}, "shards=.* must be a list of strings"),
        ({"shards": 3}, "shards=3 must be a list of strings"),
    ],
)
def test_wrong_parameters_are_refused_when_the_dag_is_parsed(wrong, message):
    right = {"source": "data", "destination": "out.json"}
    with pytest.raises(ParameterError, match=message):
        ExportDatasetOperator(task_id="x", **{**right, **wrong})


def test_templates_are_judged_once_they_are_rendered(tmp_path):
    operator = ExportDatasetOperator(
        task_id="x", source="{{ params.source }}", destination="{{ params.destination }}", format="pairs"
    )
    write_rows(tmp_path / "a.jsonl", {"images": ["1.jpg"], "text": "t"})
    operator.source = str(tmp_path)
    operator.destination = str(tmp_path / "out.jsonl")
    with pytest.raises(AirflowFailException, match="lies inside source"):
        operator.execute({})
    operator.destination = str(tmp_path / "out.tsv")
    assert operator.execute({})["records"] == 1
    assert set(operator.template_fields) >= {"source", "shards", "destination", "aws_conn_id"}


def test_what_is_not_there_fails_at_once(tmp_path):
    with pytest.raises(AirflowFailException, match="holds no shards"):
        export(tmp_path)


def test_a_sidecar_has_keys_in_the_references_place(tmp_path):
    meta = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}
    (tmp_path / "data").mkdir()
    with (
        (tmp_path / "data" / "a.parquet").open("wb") as stream,
        SidecarWriter(stream, generated={"m": meta}, shard="a.tar") as writer,
    ):
        for sample in read(tar(("d/1.jpg", b"1"), ("d/2.jpg", b"2"))):
            writer.write(sample, [{**sample.row, "m": {"tags": ["red", sample.key]}}])
    _, path = export(tmp_path, text_field="m.tags", image_key="key")
    assert pairs(path) == [("d/1", "red, d/1"), ("d/2", "red, d/2")]
    with pytest.raises(AirflowFailException, match="'rows_without_image': 2"):
        export(tmp_path, text_field="m.tags")
