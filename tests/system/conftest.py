"""One Airflow, one S3 server and one endpoint for all system tests: starting them takes longer than any test."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from demo.airflow_instance import AirflowInstance, start_airflow
from demo.drawings import draw
from demo.s3_server import start_s3
from tests.support.stub_endpoint import StubServer, start_stub

REPOSITORY = Path(__file__).parents[2]
API_KEY = "sk-system-test-4f7a1c9e"


@dataclass
class Deployment:
    """What a DAG author has: an Airflow, a bucket, an endpoint."""

    airflow: AirflowInstance
    s3: Any
    stub: StubServer
    pictures: dict[str, bytes] = field(default_factory=dict)

    def put(self, bucket: str, key: str, body: bytes) -> None:
        self.s3.put_object(Bucket=bucket, Key=key, Body=body)

    def get(self, bucket: str, key: str) -> bytes:
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, bucket: str, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def json(self, bucket: str, key: str) -> Any:
        return json.loads(self.get(bucket, key))

    def rows(self, bucket: str, key: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.get(bucket, key).splitlines()]

    def dataset(self, bucket: str, prefix: str, *, shards: int, rows: int, seed: int) -> list[str]:
        """Upload shards of drawn pictures, each picture another; returns the shards' names."""
        rng = random.Random(seed)
        names = []
        for shard in range(shards):
            lines = []
            for row in range(rows):
                name = f"images/{shard:02}-{row:03}.png"
                picture = draw(rng, side=96).encode("PNG")
                self.pictures[f"{bucket}/{prefix}{name}"] = picture
                self.put(bucket, prefix + name, picture)
                lines.append(json.dumps({"id": row, "images": [name], "text": f"row {row}"}))
            names.append(f"part-{shard:02}.jsonl")
            self.put(bucket, prefix + names[-1], ("\n".join(lines) + "\n").encode())
        return names

    def wait_for(self, done: Callable[[], Any], what: str, timeout: float = 120) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := done()):
            assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
            time.sleep(0.25)
        return found


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("system")
    dags = root / "dags"
    dags.mkdir()
    for path in (*REPOSITORY.glob("dags/*.py"), *Path(__file__).parent.glob("dags/*.py")):
        shutil.copy(path, dags)
    with start_s3() as s3, start_stub(api_key=API_KEY, models=["stub-vlm"]) as stub:

        def connection(key: str, **extra: Any) -> str:
            fields = {"model": "stub-vlm", "max_concurrency": 16, "timeout": 10, **extra}
            return json.dumps({"conn_type": "vlm", "host": stub.base_url, "password": key, "extra": fields})

        env = {
            "AIRFLOW_CONN_AWS_DEFAULT": s3.airflow_connection_json(),
            "AIRFLOW_CONN_VLM_DEFAULT": connection(API_KEY),
            "AIRFLOW_CONN_VLM_STUB": connection(API_KEY),
            "AIRFLOW_CONN_VLM_WRONG_KEY": connection("sk-wrong-key-90125"),
            # Only what a test starts is to run.
            "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
        }
        client = s3.client()
        for bucket in ("users", "datasets"):
            client.create_bucket(Bucket=bucket)
        with start_airflow(root / "home", dags_folder=dags, env=env) as airflow:
            yield Deployment(airflow, client, stub)


@pytest.fixture
def deployment(running: Deployment) -> Deployment:
    """The deployment, with an endpoint that does what it should."""
    running.stub.set(faults={}, latency=0.0, jitter=0.0, capacity=0)
    return running
