"""What planning a large dataset costs: ``python benchmarks/plan.py``.

100,000 shards lie on an S3 server (moto, in a process of its own, over HTTP). ``PlanShardsOperator`` is called as its
task would call it, in a fresh process each time: with an empty destination, and with one in which every shard is
done. Beside it stands what boto3 alone takes to list the shards once.

moto sorts all of a bucket's keys for every page of a listing, so that most of the time would be its own. Here it
keeps them sorted, as S3 does; with ``--plain-moto`` it is as it comes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from dataset import BENCH, ROOT
from harness import LIMIT, machine

sys.path.insert(0, str(ROOT))
from demo.s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server

GOAL_SECONDS, GOAL_MB = 60, 500
MAX_TASKS = 1000
SOURCE, DESTINATION = "s3://raw/images/", "s3://tagged/images/"
TASKS = 200  # whose commits the index holds, each with files of its own


def keep_keys_sorted(backend_class: Any) -> None:
    """Make moto answer with a page of a listing without going through all other keys."""
    plain = backend_class.list_objects_v2
    # By bucket: its keys in the order of their making, and sorted.
    kept: dict[str, tuple[list[str], list[str]]] = {}

    def list_objects_v2(self: Any, **given: Any) -> Any:
        if given["delimiter"] or given["continuation_token"]:
            return plain(self, **given)
        bucket, prefix, max_keys = given["bucket"], given["prefix"] or "", given["max_keys"]
        made = list(bucket.keys.keys())
        if kept.get(bucket.name, ([], []))[0] != made:
            kept[bucket.name] = made, sorted(made)
        names = kept[bucket.name][1]
        first = max(bisect_left(names, prefix), bisect_right(names, given["start_after"] or ""))
        page = [name for name in names[first : first + max_keys + 1] if name.startswith(prefix)]
        return [bucket.keys[name] for name in page[:max_keys]], len(page) > max_keys, None

    backend_class.list_objects_v2 = list_objects_v2


def serve(shards: int, plain: bool, port: Any) -> None:
    """An S3 server with shards and their outputs in it; they are put there without HTTP, which would take minutes."""
    from moto.s3.models import S3Backend, s3_backends
    from moto.server import ThreadedMotoServer

    if not plain:
        keep_keys_sorted(S3Backend)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    backend = s3_backends["123456789012"]["aws"]
    for uri, content in ((SOURCE, b"x"), (DESTINATION, b"y")):
        _, _, bucket, prefix = uri.rstrip("/").split("/")
        backend.create_bucket(bucket, REGION)
        for number in range(shards):
            key = f"{prefix}/2026/{number // 1000:03}/part-{number:06}.jsonl"
            backend.put_object(bucket, key, content * (number * 7919 % 2000))
    port.put(server.get_host_and_port()[1])
    time.sleep(24 * 3600)


def operators() -> tuple[Any, Any]:
    """The plan, and the operator that maps over it."""
    from airflow.sdk import DAG

    from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
    from airflow_vlm_provider.operators.shards import PlanShardsOperator

    with DAG("benchmark"):
        plan = PlanShardsOperator(task_id="plan", source=SOURCE, max_tasks=MAX_TASKS)
        tag = ImageTaggingVLMOperator.partial(task_id="tag", source=SOURCE, destination=DESTINATION)
        return plan, tag.expand(shards=plan.output)


def list_only(server: S3Server) -> dict[str, Any]:
    """boto3 lists the shards."""
    client, keys, more = server.client(), [""], True
    while more:
        page = client.list_objects_v2(Bucket="raw", Prefix="images/", StartAfter=keys[-1])
        keys += (each["Key"] for each in page["Contents"])
        more = page["IsTruncated"]
    return {"shards": len(keys) - 1}


def plan_once(_: S3Server) -> dict[str, Any]:
    """The plan as its task makes it."""
    from types import SimpleNamespace

    pushed: dict[str, Any] = {}
    ti = SimpleNamespace(try_number=1, xcom_push=lambda key, value: pushed.update({key: value}))
    groups = operators()[0].execute({"ti": ti, "params": {}})
    return {"groups": len(groups), "xcom": len(json.dumps(groups)) + len(json.dumps(pushed))}


def commit_all(_: S3Server) -> dict[str, Any]:
    """Put every shard into the commit index, as tasks would that had done them."""
    from airflow_vlm_provider.ledger.commit_index import CommitEntry, CommitIndex
    from airflow_vlm_provider.operators.runners import make_runner, storage_of
    from airflow_vlm_provider.operators.storage import find_shards

    tag = operators()[1].unmap({"shards": None})
    storage = storage_of(tag)
    source, shards = find_shards(SOURCE, storage=storage)
    runner, _ = make_runner(tag, source=source, storage=storage, written_by={})
    outputs = {output.name: output.identity for output in runner.destination.list()}
    for task in range(TASKS):
        CommitIndex(runner.destination, step=runner.step.name).add(
            CommitEntry(
                shard=shard.name,
                fingerprint=runner.fingerprint,
                input=shard.identity,
                output_name=shard.name,
                output=outputs[shard.name],
                rows_in=1000,
                rows_out=1000,
                skipped=0,
                failed=0,
                kinds={},
                media=False,
                finished_at="2026-01-01T00:00:00.000000+00:00",
            )
            for shard in shards[task::TASKS]
        )
    return {}


def measured(function: Callable[[S3Server], dict[str, Any]], server: S3Server) -> dict[str, Any]:
    connection = {"conn_type": "vlm", "host": "http://127.0.0.1:9/v1", "extra": {"model": "benchmark"}}
    os.environ["AIRFLOW_CONN_VLM_DEFAULT"] = json.dumps(connection)
    os.environ["AIRFLOW_CONN_AWS_DEFAULT"] = server.airflow_connection_json()
    os.environ.update({"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY})
    operators()  # the clock starts when Airflow has imported the DAG
    start, cpu = time.perf_counter(), time.process_time()
    found = function(server)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "seconds": seconds, "cpu": cpu, "peak_mb": peak}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1, help="medians are printed (default: 1)")
    parser.add_argument("--plain-moto", action="store_true", help="let moto sort all keys for every page")
    options = parser.parse_args()
    os.environ["AIRFLOW_HOME"] = str(BENCH / "airflow")
    processes = multiprocessing.get_context("spawn")

    def run(function: Callable[[S3Server], dict[str, Any]]) -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=processes) as fresh:
            return fresh.submit(measured, function, server).result(timeout=LIMIT)

    port = processes.Queue()
    serving = processes.Process(target=serve, args=(options.shards, options.plain_moto, port), daemon=True)
    serving.start()
    try:
        server = S3Server(f"http://127.0.0.1:{port.get(timeout=LIMIT)}")
        table: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            table.setdefault("boto3 alone lists the shards", []).append(run(list_only))
        for _ in range(options.rounds):
            table.setdefault("plan, nothing done yet", []).append(run(plan_once))
        run(commit_all)
        for _ in range(options.rounds):
            table.setdefault("plan, everything done", []).append(run(plan_once))
    finally:
        serving.kill()
    print(machine())
    print(f"{options.shards:,} shards, at most {MAX_TASKS} groups")
    print(
        "| | seconds | own CPU seconds | peak memory | groups | XCom | goal |\n|---|---|---|---|---|---|---|"
    )
    for name, runs in table.items():
        seconds, cpu, peak = (
            statistics.median(each[part] for each in runs) for part in ("seconds", "cpu", "peak_mb")
        )
        groups, xcom = runs[0].get("groups", ""), runs[0].get("xcom")
        size = "" if xcom is None else f"{xcom / 1024:.1f} KiB"
        met = "met" if seconds <= GOAL_SECONDS and peak <= GOAL_MB else "missed"
        goal = "" if xcom is None else met
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} MB | {groups} | {size} | {goal} |")
    print(f"goal: {GOAL_SECONDS} s and {GOAL_MB} MB a plan")
    return 0


if __name__ == "__main__":
    sys.exit(main())
