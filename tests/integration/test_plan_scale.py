"""A plan over thousands of shards on a real S3 server: paginated, balanced, small in XCom, and nothing of it twice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_vlm_provider.ledger.commit_index import CommitEntry, CommitIndex
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.plans import resolve_shards
from airflow_vlm_provider.operators.runners import make_runner, storage_of
from airflow_vlm_provider.operators.shards import SHARD_OVERHEAD_BYTES, PlanShardsOperator
from airflow_vlm_provider.operators.storage import Storage, find_shards
from demo.s3_server import S3Server, start_s3

pytestmark = pytest.mark.integration

SHARDS = 2100
MAX_TASKS = 100
SIZES = {
    f"2026/{number // 100:02}/part-{number:05}.jsonl": random.Random(number).choice((0, 100, 100_000))
    for number in range(SHARDS)
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with start_s3(page_size=1000) as running:
        client = running.client(max_pool_connections=16)
        for bucket in ("raw", "tagged"):
            client.create_bucket(Bucket=bucket)

        def put(name: str) -> None:
            client.put_object(Bucket="raw", Key=f"images/{name}", Body=b"x" * SIZES[name])
            client.put_object(Bucket="tagged", Key=f"images/{name}", Body=b"output")

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(put, SIZES))
        yield running


@pytest.fixture(autouse=True)
def connections(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = {"conn_type": "vlm", "host": "http://127.0.0.1:9/v1", "extra": {"model": "none"}}
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW_CONN_AWS_DEFAULT", server.airflow_connection_json())


def planning(destination: str) -> PlanShardsOperator:
    with DAG("d"):
        plan = PlanShardsOperator(task_id="plan", source="s3://raw/images", max_tasks=MAX_TASKS)
        ImageTaggingVLMOperator.partial(
            task_id="tag", source="s3://raw/images", destination=destination
        ).expand(shards=plan.output)
    return plan


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of S3, by the operations' names."""
    from botocore.client import BaseClient

    made: list[str] = []
    plain = BaseClient._make_api_call

    def noted(self: Any, operation_name: str, api_params: Any) -> Any:
        made.append(operation_name)
        return plain(self, operation_name, api_params)

    monkeypatch.setattr(BaseClient, "_make_api_call", noted)
    return made


def run(plan: PlanShardsOperator) -> tuple[list[Any], int]:
    """What the plan returns, and how many bytes of XCom it takes in all."""
    pushed: dict[str, Any] = {}
    ti = SimpleNamespace(try_number=1, xcom_push=lambda key, value: pushed.update({key: value}))
    returned = plan.execute({"ti": ti, "params": {}})
    return returned, len(json.dumps(returned)) + len(json.dumps(pushed))


def names(returned: list[Any]) -> list[list[str]]:
    storage = Storage(aws_conn_id="aws_default")
    return [resolve_shards(each, open_store=storage.open_store) or [] for each in returned]


def commit(mapped: Any, chosen: list[str]) -> None:
    """Enter shards into the commit index as done."""
    tag = mapped.unmap({"shards": None})
    storage = storage_of(tag)
    source, shards = find_shards(tag.source, storage=storage)
    runner, _ = make_runner(tag, source=source, storage=storage, written_by={})
    outputs = {each.name: each.identity for each in runner.destination.list()}
    CommitIndex(runner.destination, step=runner.step.name).add(
        CommitEntry(
            shard=shard.name,
            fingerprint=runner.fingerprint,
            input=shard.identity,
            output_name=shard.name,
            output=outputs[shard.name],
            rows_in=1,
            rows_out=1,
            skipped=0,
            failed=0,
            kinds={},
            media=False,
            finished_at="2026-01-01T00:00:00.000000+00:00",
        )
        for shard in shards
        if shard.name in chosen
    )


def test_a_plan_of_thousands_is_complete_even_and_small(requests):
    plan = planning("s3://tagged/elsewhere")
    returned, xcom = run(plan)
    assert len(returned) == MAX_TASKS
    assert xcom < 16 * 1024
    # A page of the listing for a thousand shards, one file for the plan, and nothing for any single shard.
    assert requests.count("ListObjectsV2") < 10
    assert len(requests) < 20
    groups = names(returned)
    assert sorted(name for group in groups for name in group) == sorted(SIZES)
    loads = [sum(SIZES[name] + SHARD_OVERHEAD_BYTES for name in group) for group in groups]
    assert max(loads) - min(loads) <= max(SIZES.values()) + SHARD_OVERHEAD_BYTES
    assert run(plan)[0] == returned


def test_what_is_done_is_left_out_without_a_request_for_each(requests):
    plan = planning("s3://tagged/images")
    mapped = plan.dag.get_task("tag")
    left = sorted(SIZES)[::3]
    commit(mapped, [name for name in SIZES if name not in left])
    del requests[:]
    returned, _ = run(plan)
    assert sorted(name for group in returned for name in group) == left
    assert len(requests) < 30
    commit(mapped, left)
    del requests[:]
    assert run(plan)[0] == []
    assert len(requests) < 30
