from __future__ import annotations

import csv
import io
import json
import tracemalloc
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.exporters.coco import SPOOL_BYTES, Coco
from airflow_vlm_provider.exporters.examples import Example
from airflow_vlm_provider.exporters.llava import Llava
from airflow_vlm_provider.exporters.pairs import JsonLinesPairs, TabSeparatedPairs

CAT = Example("k1", ("a.jpg",), 'A "cat",\n\tasleep — é 猫')
TWO = Example(None, ("b.jpg", "a.jpg"), "Both")
ROWS = [[CAT], [TWO], [Example("k2_0", ("c",), "x"), Example("k2_1", ("d",), "y")]]


def export(exporter: Any, rows: list[list[Example]]) -> tuple[bytes, list[int]]:
    stream = io.BytesIO()
    with exporter.open(stream) as sink:
        counts = [sink.add(examples) for examples in rows]
    return stream.getvalue(), counts


def test_llava_conversations():
    data, counts = export(Llava(prompt="What is it?"), ROWS)
    assert counts == [1, 1, 2]
    assert json.loads(data) == [
        {
            "id": "k1",
            "image": "a.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": CAT.caption},
            ],
        },
        {
            "id": "000000001",
            "image": ["b.jpg", "a.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nWhat is it?"},
                {"from": "gpt", "value": "Both"},
            ],
        },
        *(
            {
                "id": name,
                "image": image,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": caption},
                ],
            }
            for name, image, caption in (("k2_0", "c", "x"), ("k2_1", "d", "y"))
        ),
    ]


def test_coco_captions():
    again = Example(None, ("a.jpg",), "Again")
    data, counts = export(Coco(description="d"), [[CAT], [again], *ROWS[1:], [CAT]])
    assert counts == [1, 1, 2, 2, 1]
    assert json.loads(data) == {
        "info": {"description": "d"},
        "licenses": [],
        "images": [
            {"id": 1, "file_name": "a.jpg"},
            {"id": 2, "file_name": "b.jpg"},
            {"id": 3, "file_name": "c"},
            {"id": 4, "file_name": "d"},
            # Rows that do not follow one another are not compared.
            {"id": 5, "file_name": "a.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": CAT.caption},
            {"id": 2, "image_id": 1, "caption": "Again"},
            {"id": 3, "image_id": 2, "caption": "Both"},
            {"id": 4, "image_id": 1, "caption": "Both"},
            {"id": 5, "image_id": 3, "caption": "x"},
            {"id": 6, "image_id": 4, "caption": "y"},
            {"id": 7, "image_id": 5, "caption": CAT.caption},
        ],
    }


def test_pairs_as_json_lines():
    data, counts = export(JsonLinesPairs(), ROWS)
    assert counts == [1, 2, 2]
    assert [json.loads(line) for line in data.splitlines()] == [
        {"image": "a.jpg", "text": CAT.caption},
        {"image": "b.jpg", "text": "Both"},
        {"image": "a.jpg", "text": "Both"},
        {"image": "c", "text": "x"},
        {"image": "d", "text": "y"},
    ]


def test_pairs_as_tab_separated_values():
    data, counts = export(TabSeparatedPairs(), [*ROWS, [Example(None, ('odd\t"\n.jpg', "odd\r.jpg"), "z")]])
    assert counts == [1, 2, 2, 2]
    expected = [
        ("a.jpg", 'A "cat", asleep — é 猫'),
        ("b.jpg", "Both"),
        ("a.jpg", "Both"),
        ("c", "x"),
        ("d", "y"),
        ('odd\t"\n.jpg', "z"),
        ("odd\r.jpg", "z"),
    ]
    found = csv.reader(io.StringIO(data.decode(), newline=""), dialect="excel-tab")
    assert [tuple(line) for line in found] == [("image", "text"), *expected]
    frame = pandas.read_csv(io.BytesIO(data), sep="\t", keep_default_na=False)
    assert [tuple(row) for row in frame[["image", "text"]].to_numpy()] == expected


@pytest.mark.parametrize("exporter", [Llava(), Coco()])
def test_an_empty_export_is_still_json(exporter):
    data, _ = export(exporter, [])
    parsed = json.loads(data)
    assert parsed == ([] if isinstance(exporter, Llava) else parsed | {"images": [], "annotations": []})


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(deadline=None)  # A busy machine is no failure.
@given(
    rows=st.lists(
        st.lists(
            st.builds(Example, st.none() | names, st.lists(names, min_size=1, max_size=3).map(tuple), names)
        ),
        max_size=5,
    )
)
def test_coco_holds_every_image_and_caption(rows):
    data, counts = export(Coco(), rows)
    dataset = json.loads(data)
    images = {image["id"]: image["file_name"] for image in dataset["images"]}
    assert len(images) == len(dataset["images"])
    assert [each["id"] for each in dataset["annotations"]] == list(range(1, sum(counts) + 1))
    assert [(images[each["image_id"]], each["caption"]) for each in dataset["annotations"]] == [
        (image, example.caption) for row in rows for example in row for image in example.images
    ]


@pytest.mark.parametrize("exporter", [Llava(), Coco(), JsonLinesPairs(), TabSeparatedPairs()])
def test_memory_does_not_grow_with_the_export(exporter):
    class Nowhere(io.RawIOBase):
        size = 0

        def write(self, data: Any) -> int:
            self.size += len(data)
            return len(data)

    stream, caption = Nowhere(), "c" * 100_000
    tracemalloc.start()
    with exporter.open(stream) as sink:
        for number in range(1000):
            sink.add([Example(None, (f"{number}.jpg",), caption)])
        most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.size > 100_000_000
    assert most < SPOOL_BYTES * 2
