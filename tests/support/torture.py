"""Kills a task at random moments until it is done all the same, and compares what comes of it with an undisturbed run.

What is counted is counted by the endpoint. ``make torture`` runs the long form of tests/integration/test_crash.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.images import encode
from tests.support.stub_endpoint import StubServer
from tests.support.task_processes import Tasks

IN_FLIGHT = 8
FLUSH_ANSWERS = 12
# What a kill may cost: what was in flight, what stood ready and was sent while answers waited for the storage, and what
# was answered but not yet durable. See docs/guarantees.md.
WINDOW = IN_FLIGHT + max(8, IN_FLIGHT // 2) + FLUSH_ANSWERS
CONNECTION = "vlm_crash"


def environment(base_url: str, aws_connection: str) -> dict[str, str]:
    """Connections and configuration of tortured tasks."""
    extra = {"model": "stub-vlm", "max_concurrency": IN_FLIGHT, "timeout": 10}
    connection = {"conn_type": "vlm", "host": base_url, "password": "sk-crash-test", "extra": extra}
    return {
        f"AIRFLOW_CONN_{CONNECTION.upper()}": json.dumps(connection),
        "AIRFLOW_CONN_AWS_DEFAULT": aws_connection,
        "AIRFLOW__VLM__JOURNAL_FLUSH_ANSWERS": str(FLUSH_ANSWERS),
        "AIRFLOW__VLM__JOURNAL_FLUSH_SECONDS": "0.5",
    }


@dataclass
class Round:
    """One dataset tortured until it was done.

    :ivar kills: How often the task was killed.
    :ivar kills_at_work: How often after it had sent something.
    :ivar repeated: How many requests the endpoint got more than once, each time beyond the first counted.
    """

    kills: int = 0
    kills_at_work: int = 0
    repeated: int = 0


class Dataset:
    """Shards in a bucket, every row with a picture of its own.

    :param client: A boto3 S3 client.
    """

    def __init__(self, client: Any, bucket: str, *, shards: int, rows: int, seed: int) -> None:
        from PIL import Image

        self.client, self.bucket = client, bucket
        client.create_bucket(Bucket=bucket)
        rng = random.Random(seed)
        self.names = []
        for shard in range(shards):
            lines = []
            for row in range(rows):
                picture = encode(Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3)), "PNG")
                name = f"images/{shard:02}-{row:03}.png"
                client.put_object(Bucket=bucket, Key=f"in/{name}", Body=picture)
                lines.append(json.dumps({"id": f"{shard}-{row}", "images": [name], "text": "Zoë"}))
            self.names.append(f"part-{shard:02}.jsonl")
            body = "\n".join(lines).encode() + b"\n"
            client.put_object(Bucket=bucket, Key=f"in/{self.names[-1]}", Body=body)
        self.rows = shards * rows

    def parameters(self, destination: str) -> dict[str, Any]:
        return {
            "source": f"s3://{self.bucket}/in",
            "destination": f"s3://{self.bucket}/{destination}",
            "vlm_conn_id": CONNECTION,
        }

    def output(self, destination: str) -> dict[str, bytes]:
        """The shards that were written, by name."""
        return {name: self._get(f"{destination}/{name}") for name in self.names}

    def manifests(self, destination: str) -> list[dict[str, Any]]:
        keys = [f"{destination}/_vlm/{name}/image_tagging/manifest.json" for name in self.names]
        return [json.loads(self._get(key)) for key in keys]

    def _get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())


def sent(stub: StubServer) -> dict[str, int]:
    """How often the endpoint was asked about each picture so far."""
    return dict(stub.stats()["by_image"])


def torture(
    tasks: Tasks,
    stub: StubServer,
    parameters: dict[str, Any],
    *,
    rng: random.Random,
    most_kills: int,
    stop: signal.Signals = signal.SIGKILL,
    longest: float = 1.5,
) -> Round:
    """Start a task again and again, each time stopping it, until it has ended by itself before that.

    One time in five it is stopped at any moment from its start; else, however slow the machine, at any moment from
    its first request.

    :param most_kills: After so many, the task is let alone.
    :param longest: Most seconds that it gets.
    """
    before = sent(stub)
    done = Round()
    while True:
        at_start = sum(sent(stub).values())
        task = tasks.start(**parameters)
        if done.kills < most_kills:
            if rng.random() < 0.8:
                while sum(sent(stub).values()) == at_start and not task.ended():
                    time.sleep(0.02)
            time.sleep(rng.uniform(0, longest))
            if not task.ended():
                os.kill(task.pid, stop)
        at_end = sum(sent(stub).values())
        status = task.wait()
        if status == 0:
            break
        assert status in (-signal.SIGKILL, 1), task.said()[-4000:]
        assert status == -stop or "told to stop" in task.said(), task.said()[-4000:]
        done.kills += 1
        done.kills_at_work += at_end > at_start
    new = {image: count - before.get(image, 0) for image, count in sent(stub).items()}
    done.repeated = sum(count - 1 for count in new.values() if count > 1)
    return done


def torn_segments(client: Any, bucket: str, prefix: str) -> list[str]:
    """Names of journal segments that can't be read whole."""
    from airflow_vlm_provider.ledger.segments import TornSegmentError, read_segment

    torn = []
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for entry in (entry for page in pages for entry in page.get("Contents", ())):
        if "/journal/" in entry["Key"]:
            data = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            try:
                read_segment(data)
            except TornSegmentError:
                torn.append(entry["Key"])
    return torn


def logs(folder: Path) -> str:
    """Everything that tasks said."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("task-*.log")))
