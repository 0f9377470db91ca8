from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.shards.opening import locate, open_store
from airflow_vlm_provider.shards.s3 import MAX_KEY_BYTES, S3Store
from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    OutsideRootError,
    Store,
    check_name,
    is_hidden,
    is_same_authority,
    split_uri,
)

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

OUTSIDE = ["/etc/passwd", "..", "../x", "a/../b", "a/..", "//x"]
INVALID = ["", ".", "a/", "a//b", "./a", "a/./b", "a\\b", "..\\x", "a\0b", "a\ud800", "a\udc80"]


def no_client() -> None:
    raise AssertionError("a bad name reached S3")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(root=str(tmp_path))
    return S3Store(bucket="bucket", prefix="base", client_factory=no_client)


@pytest.mark.parametrize("name", OUTSIDE + INVALID)
def test_every_method_refuses_bad_names(store: Store, name: str) -> None:
    error = OutsideRootError if name in OUTSIDE else InvalidNameError
    with pytest.raises(error):
        store.stat(name)
    with pytest.raises(error):
        store.open(name)
    with pytest.raises(error):
        store.read(name, max_bytes=10)
    with pytest.raises(error), store.create(name):
        pass


@untimed
@given(st.text(st.sampled_from("./\\ab\0_")))
def test_a_name_that_passes_stays_below_the_root(name: str) -> None:
    try:
        check_name(name)
    except InvalidNameError:
        return
    path = Path("/base/data") / name
    assert Path("/base/data") in Path(*path.parts).parents
    assert ".." not in path.parts
    assert str(path) == "/base/data/" + name


def test_odd_names_that_are_harmless_are_names_like_others(tmp_path: Path) -> None:
    store = LocalStore(root=str(tmp_path))
    harmless = ["...", "a..b", "..a", "~", "a b", "é/ü", "C:", "%2e%2e", "a?b#c", "-rf"]
    for name in harmless:
        check_name(name)
        with store.create(name) as stream:
            stream.write(name.encode())
    assert [store.read(name, max_bytes=9).decode() for name in harmless] == harmless


def test_a_name_too_long_is_invalid(store: Store) -> None:
    with pytest.raises(InvalidNameError):
        store.stat("x" * MAX_KEY_BYTES)


def test_hidden_names() -> None:
    assert [is_hidden(name) for name in ["_vlm/a", "a/_b", ".git/a", "a/.b/c"]] == [True] * 4
    assert [is_hidden(name) for name in ["a", "a_b/c.d", "a/b_"]] == [False] * 3


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/", "s3://bucket/"),
        ("s3://bucket/a/b", "s3://bucket/a/b/"),
        ("s3://bucket/a/b//", "s3://bucket/a/b/"),
        ("s3://bucket/a b%20?#", "s3://bucket/a b%20?#/"),
        ("gs://bucket/a/b", "gs://bucket/a/b/"),
        ("GS://bucket", "gs://bucket/"),
        ("gs://connection@bucket/a/", "gs://connection@bucket/a/"),
        ("memory:///a", "memory:///a/"),
        ("file:///data/images", "file:///data/images/"),
        ("file://localhost/data/images/", "file:///data/images/"),
        ("file:///", "file:///"),
        ("/data/x/../images/", "file:///data/images/"),
        ("/data/a b%20?#", "file:///data/a b%20?#/"),
    ],
)
def test_a_stores_uri_is_normalised_and_opens_the_same_store(uri: str, normal: str) -> None:
    assert open_store(uri).uri == normal
    assert open_store(normal).uri == normal


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("data").uri == f"file://{tmp_path}/data/"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3a://bucket/a", "write s3:// instead"),
        ("local:///data", "write file:/// instead"),
        ("https://host/data", "media_roots"),
        ("1gs://bucket/a", "scheme '1gs'"),
        ("://bucket/a", "scheme ''"),
        ("gs:///a", "no bucket; write gs://bucket/prefix"),
        ("gs://connection@/a", "no bucket"),
        ("memory://", "no bucket"),
        ("s3://connection@bucket/a", "aws_conn_id"),
        ("gs://me:hush@bucket/a", r"gs://\*\*\*@bucket/a holds a password"),
        ("s3:///a", "no bucket"),
        ("s3://", "no bucket"),
        ("file://host/a", "three slashes"),
        ("file://", "three slashes"),
        ("", "empty URI"),
    ],
)
def test_what_is_no_store_is_refused_with_a_remedy(uri: str, message: str) -> None:
    for function in (open_store, locate, split_uri):
        with pytest.raises(ConfigError, match=message) as raised:
            function(uri)
        assert "hush" not in str(raised.value)


def test_locate_tells_one_shard_from_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(b"{}")

    def located(uri: str) -> tuple[str, str | None]:
        store, name = locate(uri)
        return store.uri, name

    directory = f"file://{tmp_path}/sub/"
    assert located(f"{tmp_path}/sub/a.jsonl") == (directory, "a.jsonl")
    assert located(f"{directory}a.jsonl") == (directory, "a.jsonl")
    assert located("sub/a.jsonl") == (directory, "a.jsonl")
    assert located("sub") == (directory, None)
    assert located("sub/") == (directory, None)
    assert located("sub/.") == (directory, None)
    assert located("sub/a.jsonl/") == (f"{directory}a.jsonl/", None)
    assert located("sub/none.jsonl") == (f"{directory}none.jsonl/", None)
    monkeypatch.chdir(tmp_path / "sub")
    assert located("a.jsonl") == (directory, "a.jsonl")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("bucket", "bucket", True),
        ("bucket", "bucket2", False),
        ("mine@bucket", "bucket", True),
        ("mine@bucket", "mine@bucket", True),
        ("mine@bucket", "yours@bucket", False),
        ("mine@bucket", "mine@bucket2", False),
    ],
)
def test_two_connections_are_two_places(one: str, other: str, same: bool) -> None:
    assert is_same_authority(one, other) is same
    assert is_same_authority(other, one) is same


def test_a_scheme_without_a_file_system_is_refused_when_it_is_first_used() -> None:
    store = open_store("nothing://bucket/a")
    for use in (lambda: store.stat("x"), lambda: list(store.list()), lambda: locate("nothing://bucket/a/x")):
        with pytest.raises(ConfigError, match="there is no file system for nothing://"):
            use()


def test_nothing_heavy_is_imported_for_a_dag_file() -> None:
    script = (
        "import sys; from airflow_vlm_provider.shards import opening;"
        "opening.open_store('s3://bucket/a'); opening.open_store('gs://bucket/a');"
        "sys.exit(bool({'boto3', 'botocore', 'fsspec', 'pyarrow'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
