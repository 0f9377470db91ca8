"""Which form an output has, under which name, and what is said when a shard can't have one."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.output_names import check_output_names, output_name
from tests.support.fakes import ScriptedEngine
from tests.support.parquet_shards import parquet
from tests.support.place import Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("shards", "output"),
    [
        (["a.tar", "a.tgz"], None),
        (["b/a.tar", "b/a.parquet", "c.tar"], None),
        (["a.tar", "a.parquet"], "sidecar"),
        (["a.jsonl", "a.ndjson.gz"], "sidecar"),
        (["a.TAR", "a.TGZ"], None),
    ],
)
def test_shards_whose_outputs_would_be_one_file_are_refused(shards, output):
    with pytest.raises(ConfigError, match="would be one file") as refused:
        check_output_names(shards, output=output)
    for name in shards[:2]:
        assert repr(name) in str(refused.value)


@pytest.mark.parametrize(
    ("shards", "output"),
    [
        (["a.tar", "a.tar.gz", "a.parquet", "a.jsonl"], "full"),
        (["a.tar", "a.jsonl", "a.jsonl.gz", "b/a.tar", "a.b.tar"], None),
        (["a.parquet", "a.jsonl", "a.jsonl.zst"], None),
        (["a.tar", "b.jsonl", "c.parquet"], "sidecar"),
    ],
)
def test_shards_of_one_stem_whose_outputs_differ_are_not(shards, output):
    check_output_names(shards, output=output)
    assert len({output_name(name, output) for name in shards}) == len(shards)


def test_the_output_of_a_shard_that_is_done_is_not_overwritten_by_anothers(place):
    rows = [{"text": "a"}]
    plain, packed = place.shard("a.jsonl", rows), place.shard("a.ndjson", rows)
    place.run(ScriptedEngine(), plain, output="sidecar")
    with pytest.raises(ConfigError, match=r"'a\.jsonl' and 'a\.ndjson' would be one file"):
        place.run(ScriptedEngine(), packed, output="sidecar")
    place.run(ScriptedEngine(), packed, output="full")
    # Gone from the source, it has no claim any more: it was only given another name.
    (place.source_path / "a.jsonl").unlink()
    place.run(ScriptedEngine(), packed, output="sidecar")


def test_a_table_that_merely_lies_beside_a_shard_is_nobodys_business(place):
    shard = place.shard("a.jsonl", [{"text": "a"}])
    (place.source_path / "a.parquet").write_bytes(parquet({"url": ["x"]}))
    place.run(ScriptedEngine(), shard, output="sidecar")
    assert (place.destination_path / "a.parquet").exists()


def test_what_a_shard_can_not_take_is_said_with_its_name(place):
    place.shard("good.jsonl", [{"text": "a"}])
    (place.source_path / "odd.parquet").write_bytes(parquet({"text": ["a"], "caption": [1]}))
    with pytest.raises(ConfigError, match=r"in/odd\.parquet: The column 'caption' .* has the type int64"):
        place.run(ScriptedEngine(lambda about: "b"), place.source.stat("odd.parquet"))


def test_a_sidecar_is_refused_as_a_shard_and_its_own_shard_is_named(place):
    shard = place.shard("a.jsonl", [{"text": "a"}])
    engine = ScriptedEngine(lambda about: "b")
    place.run(engine, shard, output="sidecar")
    sidecar = (place.destination_path / "a.parquet").read_bytes()
    (place.source_path / "side.parquet").write_bytes(sidecar)
    with pytest.raises(ConfigError, match=r"in/side\.parquet is no shard, but the sidecar of 'a\.jsonl'"):
        place.run(engine, place.source.stat("side.parquet"))
    # Whoever has joined it to other columns knows what they do.
    table = pq.read_table(io.BytesIO(sidecar)).append_column("text", pa.array(["c"]))
    (place.source_path / "joined.parquet").write_bytes(parquet(table.replace_schema_metadata()))
    (manifest,) = place.run(engine, place.source.stat("joined.parquet"))
    assert (manifest.counts.rows_in, manifest.counts.skipped) == (1, 1)


def test_a_name_that_has_no_room_for_the_sidecars_suffix_is_refused_with_a_remedy(place):
    name = "a" * 250 + ".tar"
    (place.source_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.tar: .*a\.parquet cannot be an object: .* output='full'"):
        place.run(ScriptedEngine(lambda about: "b"), place.source.stat(name))
