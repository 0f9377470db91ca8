"""From URIs and Airflow's connections to stores and shards."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.sdk.io import attach, store
from fsspec.implementations.memory import MemoryFileSystem

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.destination import check_destination
from airflow_vlm_provider.operators.storage import Storage, filesystem_factory, find_shards
from airflow_vlm_provider.shards.stores import ObjectInfo


@pytest.fixture(autouse=True)
def no_stores_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_STORE_CACHE", {})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What Airflow is asked for: the scheme and the connection."""
    asked: list[tuple[str, str | None]] = []

    def get_fs(scheme: str, conn_id: str | None = None, storage_options: object = None) -> MemoryFileSystem:
        asked.append((scheme, conn_id))
        if conn_id == "unknown":
            raise AirflowNotFoundException("The conn_id `unknown` isn't defined")
        return MemoryFileSystem()

    monkeypatch.setattr("airflow.sdk.io.get_fs", get_fs)
    return asked


@pytest.mark.parametrize(
    ("uri", "storage_conn_id", "connection"),
    [
        ("gs://bucket/a/", None, None),
        ("gs://bucket/a/", "given", "given"),
        ("gs://spelt@bucket/a/", None, "spelt"),
        ("gs://spelt@bucket/a/", "given", "spelt"),
    ],
)
def test_the_file_system_is_airflows(
    asked: list[Any], uri: str, storage_conn_id: str | None, connection: str | None
) -> None:
    assert isinstance(filesystem_factory(storage_conn_id)(uri), MemoryFileSystem)
    assert asked == [("gs", connection)]


def test_a_missing_connection_is_named(asked: list[Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"`unknown` isn't defined\. Create the connection, or correct storage_conn"
    ):
        filesystem_factory("unknown")("gs://bucket/")


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("gs://bucket/", "Install apache-airflow-providers-google on the workers"),
        ("abfs://container/", "Install apache-airflow-providers-microsoft-azure on the workers"),
        ("memory://bucket/", r"register one by airflow\.sdk\.io\.attach\(\)"),
        ("nothing://bucket/", "Install the provider that has it"),
    ],
)
def test_a_scheme_that_airflow_has_no_file_system_for_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, uri: str, remedy: str
) -> None:
    # As without any provider that has file systems, whatever is installed here.
    monkeypatch.setattr("airflow.sdk.io.fs._register_filesystems", dict)
    opened = Storage(aws_conn_id=None).open_store(uri)
    with pytest.raises(ConfigError, match=remedy):
        list(opened.list())


def test_a_file_system_that_is_attached_is_used() -> None:
    attach(protocol="memory", fs=MemoryFileSystem(global_store=False, skip_instance_cache=True))
    storage = Storage(aws_conn_id=None)
    with storage.open_store("memory://bucket/out").create("d/a.jsonl") as stream:
        stream.write(b"{}\n")
    found, shards = find_shards("memory://bucket/out", storage=storage)
    assert (found.uri, [shard.name for shard in shards]) == ("memory://bucket/out/", ["d/a.jsonl"])
    found, shards = find_shards("memory://bucket/out/d/a.jsonl", storage=storage)
    assert (found.uri, [shard.name for shard in shards]) == ("memory://bucket/out/d/", ["a.jsonl"])
    with pytest.raises(ConfigError, match=r"holds no shards: .*\.jsonl, .*\.parquet"):
        find_shards("memory://bucket/none", storage=storage)


def test_shards_with_impossible_names_are_left_out_and_the_others_done(caplog: Any) -> None:
    names = ["d1//odd.jsonl", "d2/a\\b.jsonl", "x" * 1000 + ".jsonl", "good.jsonl", "no-shard.txt"]
    listing = SimpleNamespace(list=lambda: [ObjectInfo(name, 1, "i") for name in names])
    storage: Any = SimpleNamespace(locate=lambda uri: (listing, None))
    with caplog.at_level(logging.WARNING):
        _, found = find_shards("s3://b/", storage=storage)
    assert [each.name for each in found] == ["good.jsonl"]
    assert len([record for record in caplog.records if "Left out a shard" in record.getMessage()]) == 3


def test_a_shard_named_outside_the_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shards names '\.\./x\.jsonl'"):
        find_shards(str(tmp_path), ["../x.jsonl"], storage=Storage(aws_conn_id=None))


@pytest.mark.parametrize("name", ["_a.jsonl", "d/.b/c.jsonl"])
def test_a_name_that_is_no_data_is_refused_as_a_shard(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}\n")
    storage = Storage(aws_conn_id=None)
    with pytest.raises(ConfigError, match=r"begins with '_' or '\.'.*Rename"):
        find_shards(str(tmp_path), [name], storage=storage)
    # What the folders of the source are called is of no matter.
    folder, _, shard = f"{tmp_path}/_in/b.jsonl".rpartition("/")
    (tmp_path / "_in").mkdir()
    (tmp_path / "_in" / "b.jsonl").write_text("{}\n")
    assert [each.name for each in find_shards(folder, storage=storage)[1]] == [shard]


@pytest.mark.parametrize("uri", ["https://host/in/", "gs:///in", "gs://me:hush@bucket/in", "s3a://b/in"])
def test_a_uri_of_no_store_is_refused_at_once(uri: str) -> None:
    for source, destination in ((uri, "s3://out/"), ("s3://in/", uri)):
        with pytest.raises(ConfigError) as raised:
            check_destination(source, destination)
        assert "hush" not in str(raised.value)
