from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.exporters.examples import Example, ExampleReader


def test_a_row_with_a_text_is_one_example_of_all_its_images():
    row = {"id": 7, "images": ["a.jpg", "b.jpg"], "text": "<__dj__image>\n A cat. <|__dj__eoc|>"}
    found = ExampleReader().read(row)
    assert found.examples == (Example("7", ("a.jpg", "b.jpg"), "A cat."),)
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a <__dj__image> b", "a b"),
        ("<__dj__video>two\nlines <|__dj__eoc|>", "two\nlines"),
        (["red", " cat ", "", None, "<__dj__image>"], "red, cat"),
        (("red", "cat"), "red, cat"),
        ("half \ud800 a pair", "half ? a pair"),
    ],
)
def test_what_becomes_of_a_caption(text, caption):
    (example,) = ExampleReader().read({"images": "a.jpg", "text": text}).examples
    assert example == Example(None, ("a.jpg",), caption)


@pytest.mark.parametrize(
    "text", [None, "", " ", "<__dj__image>", [], [None], 3, {"a": "b"}, [3], [["a"], "b"], ["b", 3]]
)
def test_a_row_without_a_caption_is_counted(text):
    found = ExampleReader().read({"images": ["a.jpg"], "text": text})
    assert found.examples == ()
    assert found.left_out == {"rows_without_caption": 1}


@pytest.mark.parametrize("images", [None, [], "", [""], ["a.jpg", None], [{"path": "a.jpg"}], 3, ["\udcff"]])
def test_a_row_without_an_image_is_counted(images):
    found = ExampleReader().read({"images": images, "text": "t"})
    assert found.examples == ()
    assert found.left_out == {"rows_without_image": 1}


def test_tags_by_image_are_an_example_for_each_image():
    reader = ExampleReader(text_field="__dj__meta__.image_tags")
    row = {"__key__": "k", "images": ["a", "b", "c"], "__dj__meta__": {"image_tags": [["x", "y"], [], ["z"]]}}
    found = reader.read(row)
    assert found.examples == (Example("k_0", ("a",), "x, y"), Example("k_2", ("c",), "z"))
    assert found.left_out == {"images_without_caption": 1}
    one = {"__key__": "k", "images": ["a"], "__dj__meta__": {"image_tags": [["x", "y"]]}}
    assert reader.read(one).examples == (Example("k", ("a",), "x, y"),)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ([["x"]], "rows_mismatched"),
        ([["x"], ["y"], ["z"]], "rows_mismatched"),
        ([[], []], "rows_without_caption"),
        ([None, []], "rows_without_caption"),
    ],
)
def test_tags_that_fit_no_image_are_counted(tags, reason):
    found = ExampleReader(text_field="t").read({"images": ["a", "b"], "t": tags})
    assert found.examples == ()
    assert found.left_out == {reason: 1}


def test_a_path_finds_fields_within_fields_and_names_with_dots():
    row = {"images": ["a"], "m": {"x.y": {"z": "deep"}, "s": "text"}, "m.s": "dotted"}
    captions = {
        path: [example.caption for example in ExampleReader(text_field=path).read(row).examples]
        for path in ("m.x.y.z", "m.s", "m.s.t", "m.q.r", "m.x.y")
    }
    assert captions == {"m.x.y.z": [], "m.s": ["dotted"], "m.s.t": [], "m.q.r": [], "m.x.y": []}
    nested = ExampleReader(text_field="m.s.t").read({"images": ["a"], "m": {"s.t": "dotted below"}})
    assert nested.examples[0].caption == "dotted below"


@pytest.mark.parametrize(
    ("base", "folder", "reference", "expected"),
    [
        (None, "", "img/a.jpg", "img/a.jpg"),
        (None, "day", "img/a.jpg", "day/img/a.jpg"),
        ("s3://b/raw", "", "a.jpg", "s3://b/raw/a.jpg"),
        ("s3://b/raw/", "day/x", "a.jpg", "s3://b/raw/day/x/a.jpg"),
        ("s3://b/raw", "day", "s3://other/a.jpg", "s3://other/a.jpg"),
        ("s3://b/raw", "day", "/data/a.jpg", "/data/a.jpg"),
        ("s3://b/raw", "day", "https://x/a.jpg", "https://x/a.jpg"),
        ("", "", "a.jpg", "a.jpg"),
        ("/", "", "a.jpg", "/a.jpg"),
    ],
)
def test_relative_references_are_completed_and_others_are_not(base, folder, reference, expected):
    row = {"images": [reference], "text": "t"}
    (example,) = ExampleReader(image_base=base).read(row, folder=folder).examples
    assert example.images == (expected,)


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.sampled_from(["a.jpg", "<__dj__image>", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "t"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(deadline=None)  # A busy machine is no failure.
@given(row=st.fixed_dictionaries({}, optional={"images": anything, "text": anything, "id": anything}))
def test_every_row_is_an_example_or_counted(row):
    found = ExampleReader(text_field="text").read(row)
    rows_left_out = sum(count for reason, count in found.left_out.items() if reason.startswith("rows_"))
    assert rows_left_out == (0 if found.examples else 1)
    for example in found.examples:
        assert example.images
        assert all(example.images)
        assert example.caption
        example.caption.encode()
        "".join(example.images).encode()
