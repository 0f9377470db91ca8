from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.templates import fill


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("Describe.", {}, "Describe."),
        ("{text}!", {"text": "a dog"}, "a dog!"),
        ("{meta.title} {meta.size.w}", {"meta": {"title": "T", "size": {"w": 3}}}, "T 3"),
        ("{meta.title}", {"meta.title": "flat", "meta": {"title": "deep"}}, "flat"),
        ("{__dj__meta__.image_tags}", {"__dj__meta__": {"image_tags": [["猫", "b"]]}}, '[["猫", "b"]]'),
        ("{标题} {image-id}", {"标题": "x", "image-id": 7}, "x 7"),
        # Null is empty, wherever on the way it stands.
        ("<{text}><{meta.title}>", {"text": None, "meta": None}, "<><>"),
        ("{a} {b} {c}", {"a": True, "b": 1.5, "c": {"k": None}}, 'true 1.5 {"k": null}'),
        ("{d} {n} {l}", {"d": date(2026, 1, 2), "n": Decimal("1.10"), "l": [date(2026, 1, 2)]}, '2026-01-02 1.10 ["2026-01-02"]'),
        # Other braces are left alone, and what was put in is not looked through again.
        ('{"k": "v"} {} {0} { text } {{text}} {a b}', {"text": "T"}, '{"k": "v"} {} {0} { text } {T} {a b}'),
        ("{a}", {"a": "{b}", "b": "no"}, "{b}"),
    ],
)  # fmt: skip
def test_a_template_is_filled_from_the_row(template, row, expected):
    assert fill(template, row) == expected


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("{title}", {"text": "x"}, ["'title'", "does not have"]),
        ("{meta.title}", {"meta": {}}, ["'meta.title'", "does not have"]),
        ("{meta.title}", {"meta": "x"}, ["'meta.title'"]),
        ("{data}", {"data": b"\x00"}, ["'data'", "bytes"]),
        ("{data}", {"data": ["x", b"\x00"]}, ["'data'", "bytes"]),
    ],
)
def test_a_row_that_cannot_fill_it_is_malformed_and_the_field_is_named(template, row, words):
    with pytest.raises(SampleError) as caught:
        fill(template, row)
    assert caught.value.kind == "malformed_row"
    for word in words:
        assert word in caught.value.message
