"""The real ``airflow vlm ledger`` commands, on a real S3 server, by a connection of Airflow's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from airflow_vlm_provider.ledger.manifest import Counts, Manifest, save_manifest
from airflow_vlm_provider.ledger.segments import SegmentWriter
from airflow_vlm_provider.shards.opening import open_store
from demo.s3_server import S3Server, start_s3

pytestmark = pytest.mark.integration

SEGMENT = "journal/20260101T000000000000-0123abcd-0001.jsonl.zst"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with start_s3(page_size=2) as running:
        yield running


@pytest.fixture
def destination(server: S3Server) -> str:
    bucket = f"bucket-{uuid.uuid4().hex}"
    server.client().create_bucket(Bucket=bucket)
    uri = f"s3://{bucket}/some/out"
    files = open_store(uri, s3_client=server.client)
    for shard in ("a.jsonl", "sub/b.jsonl"):
        writer = SegmentWriter({})
        writer.save(files, f"_vlm/{shard}/s/{SEGMENT}")
        writer.close()
    manifest = Manifest(
        counts=Counts(rows_in=3, rows_out=3, ok=3),
        model="m",
        fingerprint="f",
        input={"uri": "s3://b/in/a.jsonl"},
        output={"uri": f"{uri}/a.jsonl"},
        errors=None,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:01+00:00",
        provider_version="0",
        journal=[SEGMENT],
    )
    save_manifest(files, "a.jsonl", "s", manifest)
    return uri


def airflow(home: Path, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    # No credentials but the connection's: boto3 would find others.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "AIRFLOW_"))}
    clean |= {"AIRFLOW_HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true", **(env or {})}
    command = [sys.executable, "-m", "airflow", *argv]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)


def test_show_and_prune_by_a_connection_in_the_environment(server, destination, tmp_path):
    env = {"AIRFLOW_CONN_AWS_DEFAULT": server.airflow_connection_json()}
    shown = airflow(tmp_path, "vlm", "ledger", "show", f"{destination}/sub/b.jsonl", "-o", "json", env=env)
    assert shown.returncode == 0, shown.stderr
    (step,) = json.loads(shown.stdout)["steps"]
    assert (step["problem"], step["segments"][0]["answers"]) == ("never committed", 0)
    table = airflow(tmp_path, "vlm", "ledger", "show", destination, env=env)
    assert [line.split()[:3] for line in table.stdout.splitlines()[1:4]] == [
        ["a.jsonl", "s", "3"],
        ["sub/b.jsonl", "s", "1"],
        ["1", "shard", "s"],
    ]
    pruned = airflow(tmp_path, "vlm", "ledger", "prune", destination, "--older-than", "1", env=env)
    assert pruned.returncode == 0, pruned.stderr
    assert pruned.stdout.startswith("Removed 0 journal segments"), "the storage says they are new"


def test_show_by_a_connection_in_the_metadata_database(server, destination, tmp_path):
    assert airflow(tmp_path, "db", "migrate").returncode == 0
    added = airflow(tmp_path, "connections", "add", "my_s3", "--conn-json", server.airflow_connection_json())
    assert added.returncode == 0, added.stderr

    shown = airflow(
        tmp_path, "vlm", "ledger", "show", f"{destination}/a.jsonl", "--aws-conn-id", "my_s3", "-o", "json"
    )

    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["steps"][0]["manifest"]["rows_in"] == 3


def test_without_a_connection_boto3_searches_for_credentials_itself(server, destination, tmp_path):
    env = {
        **{"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
        **{"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server.endpoint_url},
    }
    for options in ((), ("--aws-conn-id", "")):
        shown = airflow(
            tmp_path, "vlm", "ledger", "show", f"{destination}/a.jsonl", "-o", "json", *options, env=env
        )
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["shard"] == "a.jsonl"


def test_a_mistake_ends_in_a_sentence(tmp_path, destination):
    done = airflow(tmp_path, "vlm", "ledger", "show", destination, "--aws-conn-id", "nope")
    assert done.returncode == 1
    assert "nope" in done.stderr
    assert "Traceback" not in done.stderr
