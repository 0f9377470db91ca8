"""One Airflow, one S3 server and one endpoint for all system tests: starting them takes longer than any test."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from demo.airflow_instance import AirflowInstance, session_processes, start_airflow
from demo.drawings import draw
from demo.s3_server import start_s3
from tests.support.stub_endpoint import StubServer, start_stub

REPOSITORY = Path(__file__).parents[2]
API_KEY = "sk-system-test-4f7a1c9e"
DEMO_MODEL = {"engine": "transformers", "model": str(REPOSITORY / "demo" / "model")}
# Few, so that what a kill may cost is much less than what a test asks for.
FLUSH_ANSWERS = 8


@dataclass
class Deployment:
    """What a DAG author has: an Airflow, a bucket, an endpoint."""

    airflow: AirflowInstance
    s3: Any
    stub: StubServer
    start: Callable[..., AirflowInstance]
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)

    def put(self, bucket: str, key: str, body: bytes) -> None:
        self.s3.put_object(Bucket=bucket, Key=key, Body=body)

    def get(self, bucket: str, key: str) -> bytes:
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def keys(self, bucket: str, prefix: str) -> list[str]:
        return list(self.written(bucket, prefix))

    def json(self, bucket: str, key: str) -> Any:
        return json.loads(self.get(bucket, key))

    def rows(self, bucket: str, key: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.get(bucket, key).splitlines()]

    def written(self, bucket: str, prefix: str) -> dict[str, Any]:
        """When each object was written, by its key."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {found["Key"]: found["LastModified"] for page in pages for found in page.get("Contents", [])}

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

    def wait_for(
        self, done: Callable[[], Any], what: str, timeout: float = 120, interval: float = 0.25
    ) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := done()):
            assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
            time.sleep(interval)
        return found

    def asked(self) -> int:
        """How many requests the endpoint has got so far."""
        return self.stub.stats()["requests"]

    def run(self, dag_id: str, prefix: str, *, wait: bool = True, **conf: Any) -> str:
        """Run a DAG over a prefix of the users' bucket; returns the run's id."""
        conf = {"source": f"s3://users/{prefix}", "destination": f"s3://users/out/{prefix}", **conf}
        run_id = self.airflow.trigger_dag(dag_id, conf)
        if wait:
            self.wait_for_success(dag_id, run_id)
        return run_id

    def wait_for_success(self, dag_id: str, run_id: str) -> None:
        state = self.airflow.wait_for_run(dag_id, run_id)
        assert state == "success", self.airflow.task_instances(dag_id, run_id)

    def clear(self, dag_id: str, run_id: str, **options: Any) -> None:
        """Clear all tasks of a run, whatever became of them."""
        path = f"dags/{dag_id}/dagRuns/{quote(run_id)}/clear"
        self.airflow.api("POST", path, {"dry_run": False, "only_failed": False, **options})

    def kill_airflow(self) -> None:
        """Kill every process of Airflow's, none of which gets to know."""
        process = self.airflow.process
        while left := session_processes(process.pid):
            for each in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
            psutil.wait_procs(left, timeout=10)

    def restart(self) -> None:
        """Start Airflow again, in the home that the last one left."""
        self.airflow = self.start(
            # So that it looks every few seconds, and not minutes, whose tasks have lost their scheduler.
            AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL="5",
        )


@pytest.fixture(scope="session")
def running(tmp_path_factory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("system")
    dags = root / "dags"
    dags.mkdir()
    for folder in (REPOSITORY, Path(__file__).parent):
        for path in (*folder.glob("dags/*.py"), *folder.glob("dags/*.yaml")):
            shutil.copy(path, dags)
    for path in REPOSITORY.glob("dags/*.py"):
        (dags / f"demo_{path.name}").write_text(with_demo_model(path.read_text()))
    with (
        start_s3() as s3,
        start_stub(api_key=API_KEY, models=["stub-vlm"]) as stub,
        contextlib.ExitStack() as stack,
    ):

        def connection(key: str, **extra: Any) -> str:
            fields = {"model": "stub-vlm", "max_concurrency": 16, "timeout": 10, **extra}
            return json.dumps({"conn_type": "vlm", "host": stub.base_url, "password": key, "extra": fields})

        env = {
            "AIRFLOW_CONN_AWS_DEFAULT": s3.airflow_connection_json(),
            "AIRFLOW_CONN_VLM_DEFAULT": connection(API_KEY),
            "AIRFLOW_CONN_VLM_DEMO": json.dumps({"conn_type": "vlm", "extra": DEMO_MODEL}),
            "AIRFLOW_CONN_VLM_STUB": connection(API_KEY),
            "AIRFLOW_CONN_VLM_WRONG_KEY": connection("sk-wrong-key-90125"),
            "AIRFLOW__VLM__JOURNAL_FLUSH_ANSWERS": str(FLUSH_ANSWERS),
            # Only what a test starts is to run.
            "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
            "HF_HUB_OFFLINE": "1",
            # Several tasks share this machine's cores.
            "OMP_NUM_THREADS": "1",
        }

        def start(**more: str) -> AirflowInstance:
            return stack.enter_context(start_airflow(root / "home", dags_folder=dags, env={**env, **more}))

        client = s3.client()
        for bucket in ("users", "datasets"):
            client.create_bucket(Bucket=bucket)
        yield Deployment(start(), client, stub, start)


def with_demo_model(dag: str) -> str:
    """A DAG's file, changed as its author might: under another name, and with the connection of the demo model."""
    changed = dag.replace('dag_id="', 'dag_id="demo_').replace(
        "default_args={", 'default_args={"vlm_conn_id": "vlm_demo", '
    )
    assert changed.count("demo_") > 0
    assert "vlm_demo" in changed
    return changed


@pytest.fixture
def deployment(running: Deployment) -> Deployment:
    """The deployment, with an endpoint that does what it should."""
    mend(running.stub)
    return running


def mend(stub: StubServer) -> None:
    """Let the endpoint do what it should."""
    stub.set(faults={}, image_faults={}, latency=0.0, jitter=0.0, capacity=0)


@dataclass(frozen=True)
class Finished:
    """A run of the DAG ``users_own`` that has ended well, and what it worked on.

    :ivar rows: How many rows there are; one of them is a dead letter.
    """

    run_id: str
    prefix: str
    shards: list[str]
    rows: int


@pytest.fixture(scope="session")
def finished(running: Deployment) -> Finished:
    mend(running.stub)
    prefix = "finished/"
    shards = running.dataset("users", prefix, shards=3, rows=12, seed=7)
    running.s3.delete_object(Bucket="users", Key=prefix + "images/01-005.png")
    return Finished(running.run("users_own", prefix), prefix, shards, rows=36)


def tags(row: dict[str, Any]) -> list[list[str]]:
    return row["__dj__meta__"]["image_tags"]
