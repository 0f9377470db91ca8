"""Which form an output has, under which name, and what is said when a shard can't have one."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.output_names import check_output_names
from tests.support.fakes import ScriptedEngine
from tests.support.parquet_shards import parquet
from tests.support.place import Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def put(place: Place, *names: str) -> None:
    for name in names:
        (place.source_path / name).parent.mkdir(parents=True, exist_ok=True)
        (place.source_path / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("there", "done", "output"),
    [
        (["a.tar", "a.tgz"], ["a.tar", "a.tgz"], None),
        (["a.tar", "a.tar.zst"], ["a.tar.zst"], None),
        (["b/a.tar", "b/a.parquet"], ["b/a.parquet"], None),
        (["a.tar", "a.parquet"], ["a.tar"], "sidecar"),
        (["a.jsonl", "a.ndjson.gz"], ["a.jsonl"], "sidecar"),
        (["a.TAR", "a.TGZ"], ["a.TAR", "a.TGZ"], None),
    ],
)
def test_shards_whose_outputs_would_be_one_file_are_refused(place, there, done, output):
    put(place, *there)
    with pytest.raises(ConfigError) as refused:
        check_output_names(place.source, done, output=output)
    for name in there:
        assert repr(name) in str(refused.value)


@pytest.mark.parametrize(
    ("there", "output"),
    [
        (["a.tar", "a.tar.gz", "a.parquet", "a.jsonl"], "full"),
        (["a.tar", "a.jsonl", "a.jsonl.gz", "b/a.tar", "a.b.tar"], None),
        (["a.parquet", "a.jsonl", "a.jsonl.zst"], None),
        (["a.tar", "b.jsonl", "c.parquet"], "sidecar"),
    ],
)
def test_shards_of_one_stem_whose_outputs_differ_are_not(place, there, output):
    put(place, *there)
    check_output_names(place.source, there, output=output)


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
