"""The tagging operator between a real S3 server and an endpoint, run as a task would run it.

Whether something was asked is told by the endpoint itself, which also says of which picture an answer is.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from PIL import Image

from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from demo.s3_server import start_s3
from tests.support.images import encode
from tests.support.places import Files
from tests.support.stub_endpoint import start_stub

META, FIELD = "__dj__meta__", "image_tags"
STEP = "image_tagging"
CONNECTION = "AIRFLOW_CONN_VLM_DEFAULT"


def picture(name: object) -> bytes:
    """A picture of its own for every name."""
    return encode(Image.frombytes("RGB", (16, 16), random.Random(str(name)).randbytes(768)), "PNG")


def packed(data: bytes, suffix: str) -> bytes:
    """The data, compressed as a name with the suffix says."""
    return {
        ".tar": lambda: data,
        ".tar.gz": lambda: gzip.compress(data),
        ".tgz": lambda: gzip.compress(data),
    }.get(suffix, lambda: zstandard.ZstdCompressor().compress(data))()


class World:
    """An S3 server and an endpoint, and operators that run against them as a task would."""

    def __init__(self, s3: Any, stub: Any) -> None:
        self.s3, self.stub = s3, stub
        self.client = s3.client()
        extra = {"model": "stub-vlm", "max_concurrency": 4}
        self.environment = {
            CONNECTION: json.dumps({"conn_type": "vlm", "host": stub.base_url, "extra": extra}),
            "AIRFLOW_CONN_AWS_DEFAULT": s3.airflow_connection_json(),
            "AIRFLOW__VLM__JOURNAL_FLUSH_ANSWERS": "4",
        }

    def bucket(self) -> Files:
        name = f"b-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return Files(f"s3://{name}", s3_client=self.s3.client)

    def asked(self) -> int:
        return int(self.stub.stats()["requests"])

    def tag(self, source: object, destination: object, **given: Any) -> dict[str, Any]:
        given = {"source": str(source), "destination": str(destination), "max_error_rate": 1.0, **given}
        return ImageTaggingVLMOperator(task_id="tag", **given).execute(context())

    def tag_counted(self, *places: object, **given: Any) -> tuple[dict[str, Any], int]:
        """What the task returned, and how many requests reached the endpoint meanwhile."""
        before = self.asked()
        return self.tag(*places, **given), self.asked() - before


@contextlib.contextmanager
def start_world() -> Iterator[World]:
    """Start both servers; until the end, connections and configuration lead to them."""
    with start_s3() as s3, start_stub() as stub, pytest.MonkeyPatch.context() as patch:
        world = World(s3, stub)
        for name, value in world.environment.items():
            patch.setenv(name, value)
        yield world


def context(**pushed: Any) -> Any:
    """What Airflow gives to a task's ``execute``."""
    ti = SimpleNamespace(
        dag_id="d", run_id="r", task_id="tag", map_index=-1, try_number=1, xcom_push=lambda **given: None
    )
    return {"ti": ti, "outlet_events": {}}


def manifest(place: Files, shard: str) -> dict[str, Any]:
    """What is committed of a shard."""
    return json.loads(place.get(f"_vlm/{shard}/{STEP}/manifest.json"))


def letters(place: Files, shard: str) -> list[tuple[int, str]]:
    """The rows of a shard that failed, and of what."""
    lines = place.get(f"_vlm/{shard}/{STEP}/errors.jsonl").splitlines()
    return [(each["row"], each["kind"]) for each in map(json.loads, lines)]
