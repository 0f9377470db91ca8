from __future__ import annotations

import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.ledger.plans import PLANS_FOLDER, PlanReference, label, load_group, parse, save_plan
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.shards.stores import InvalidNameError, check_name

GROUPS = [["a/b.jsonl", "ümlaut.jsonl"], ["with\nline\u2028ends.jsonl"], ["c.parquet"]]


@pytest.fixture
def files(tmp_path):
    return LocalStore(root=str(tmp_path))


def test_each_group_is_read_back(files):
    name = save_plan(files, GROUPS)
    assert [load_group(files, name, number) for number in range(3)] == GROUPS


def test_the_same_groups_are_the_same_file_and_others_another(files, tmp_path):
    assert save_plan(files, GROUPS) == save_plan(files, GROUPS)
    save_plan(files, GROUPS[:2])
    plans = list((tmp_path / PLANS_FOLDER).iterdir())
    assert len(plans) == 2


def test_a_plan_is_json_lines_that_any_tool_reads(files, tmp_path):
    text = zstandard.decompress((tmp_path / save_plan(files, GROUPS)).read_bytes()).decode()
    assert [json.loads(line) for line in text.split("\n")[:-1]] == GROUPS


def test_a_damaged_plan_is_not_taken_for_another_one(files, tmp_path):
    name = save_plan(files, GROUPS)
    other = tmp_path / save_plan(files, GROUPS[:2])
    (tmp_path / name).write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="damaged"):
        load_group(files, name, 0)
    (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="damaged"):
        load_group(files, name, 0)


def test_a_group_or_plan_that_is_not_there_is_no_empty_group(files):
    name = save_plan(files, GROUPS)
    with pytest.raises(ConfigError, match="3 groups"):
        load_group(files, name, 3)
    with pytest.raises(FileNotFoundError):
        load_group(files, name.replace("/_plans/", "/_plans/0"), 0)


@given(
    root=st.sampled_from(
        ["s3://b/", "s3://b/a b#1/", "file:///x/", "gs://b/100%/ü/", f"s3://b/{PLANS_FOLDER}/"]
    ),
    number=st.integers(0, 10**6),
    text=st.text(),
)
def test_a_reference_reads_back_from_its_text(root, number, text):
    reference = PlanReference(root, f"{PLANS_FOLDER}/{'0af9' * 8}.jsonl.zst", number, text)
    assert parse(str(reference)) == reference


@given(st.text())
def test_no_name_of_a_shard_is_taken_for_a_reference(name):
    reference = str(PlanReference("s3://b/", f"{PLANS_FOLDER}/{'0' * 32}.jsonl.zst", 0, name))
    assert parse(reference) is not None
    with pytest.raises(InvalidNameError):
        check_name(reference)
    for other in (name, "a.jsonl", f"{PLANS_FOLDER}/{'0' * 32}.jsonl.zst#0 {name}"):
        assert parse(other) is None


def test_a_label_says_what_is_in_a_group_and_stays_short():
    assert label([]) == "nothing"
    assert label(["a.jsonl"]) == "a.jsonl"
    assert label(["a.jsonl", "b.jsonl", "c.jsonl"]) == "a.jsonl and 2 more"
    shown = label(["deep/" * 40 + "part-1.jsonl", "b.jsonl"])
    assert len(shown) <= 72
    assert shown.endswith("/part-1.jsonl and 1 more")
