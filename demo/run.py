"""``make demo``: tag drawn pictures in an S3 bucket, under a real Airflow, and show what came out.

Starts an S3 server and an Airflow of its own, both on loopback ports and both ended again, puts shards of
pictures into a bucket, runs the DAG ``nightly_image_tagging`` with the bundled demo model, and prints the tags
beside what was drawn. ``--ui`` leaves Airflow up until Ctrl-C. Everything it leaves behind lies in ``.demo/``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.airflow_instance import AirflowError, AirflowInstance, start_airflow  # noqa: E402
from demo.drawings import Drawing, draw  # noqa: E402
from demo.s3_server import S3Server, start_s3  # noqa: E402

HOME = ROOT / ".demo"
BUCKET, DAY = "demo", "2026-11-20"
SOURCE, DESTINATION = f"s3://{BUCKET}/pictures", f"s3://{BUCKET}/pictures-tagged"
SHARDS, PICTURES_A_SHARD, SHOWN = 6, 12, 18
DAG_ID = "nightly_image_tagging"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ui", action="store_true", help="leave Airflow up until Ctrl-C")
    options = parser.parse_args()
    # However it is told to end, what it started must end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    with start_s3() as s3:
        drawn = fill_bucket(s3)
        print(f"{len(drawn)} pictures in {SHARDS} shards below {SOURCE}/{DAY}/")
        print("Starting Airflow (about half a minute) ...", flush=True)
        with start_airflow(HOME / "airflow", dags_folder=ROOT / "dags", env=environment(s3)) as airflow:
            print(f"Airflow is up at {airflow.url}")
            state, run_id = run_dag(airflow)
            try:
                rows = list(tagged_rows(s3))
                summary = airflow.xcom(DAG_ID, run_id, "summary") if state == "success" else None
            except (AirflowError, s3.client().exceptions.NoSuchKey) as error:
                rows, summary = [], None
                print(f"No result: {error}", file=sys.stderr)
            show(rows, drawn, summary)
            if state != "success":
                print(f"The run ended as {state}; logs: {airflow.log_dir}", file=sys.stderr)
            if options.ui:
                wait_for_interrupt(airflow, run_id)
    complete = state == "success" and summary is not None and summary["ok"] == len(drawn)
    return 0 if complete else 1


def environment(s3: S3Server) -> dict[str, str]:
    """Connections, as a deployment would have them in its secrets backend."""
    model = {"engine": "transformers", "model": str(ROOT / "demo" / "model")}
    return {
        "AIRFLOW_CONN_AWS_DEFAULT": s3.airflow_connection_json(),
        "AIRFLOW_CONN_VLM_DEFAULT": json.dumps({"conn_type": "vlm", "extra": model}),
        "HF_HUB_OFFLINE": "1",
        # Only the demo's own run: the schedule's would look for last night's pictures.
        "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
        # Two tasks at a time share this machine's cores.
        "OMP_NUM_THREADS": "1",
    }


def fill_bucket(s3: S3Server) -> dict[str, Drawing]:
    """Draw the pictures and upload them, with shards that refer to them by relative paths."""
    client, rng = s3.client(), random.Random(20)
    client.create_bucket(Bucket=BUCKET)
    drawn: dict[str, Drawing] = {}
    for shard in range(SHARDS):
        lines = []
        for number in range(PICTURES_A_SHARD):
            drawing = draw(rng)
            form = ("PNG", "JPEG")[number % 2]
            name = f"images/{shard:02}-{number:02}.{form.lower()}"
            client.put_object(Bucket=BUCKET, Key=f"pictures/{DAY}/{name}", Body=drawing.encode(form))
            drawn[name] = drawing
            lines.append(json.dumps({"id": f"{shard:02}-{number:02}", "images": [name], "text": ""}))
        body = ("\n".join(lines) + "\n").encode()
        name = f"part-{shard:03}.jsonl"
        if shard % 2:
            name, body = name + ".gz", gzip.compress(body, mtime=0)
        client.put_object(Bucket=BUCKET, Key=f"pictures/{DAY}/{name}", Body=body)
    return drawn


def run_dag(airflow: AirflowInstance, timeout: float = 600) -> tuple[str, str]:
    """Run the DAG and tell how its tasks get on."""
    # Each task loads the model into its own process, so a small machine is better off with few of them.
    conf = {"source": SOURCE, "destination": DESTINATION, "day": DAY, "max_tasks": 2}
    run_id = airflow.trigger_dag(DAG_ID, conf)
    print(f"Running {DAG_ID}", flush=True)
    begun, told = time.monotonic(), ""
    while True:
        state = airflow.api("GET", f"dags/{DAG_ID}/dagRuns/{run_id.replace('+', '%2B')}")["state"]
        tally: dict[str, dict[str, int]] = {}
        for each in airflow.task_instances(DAG_ID, run_id):
            states = tally.setdefault(each["task_id"], {})
            states[each["state"] or "waiting"] = states.get(each["state"] or "waiting", 0) + 1
        line = "   ".join(
            f"{task}: {', '.join(f'{count} {name}' for name, count in sorted(states.items()))}"
            for task, states in tally.items()
        )
        if line != told:
            print(f"  {time.monotonic() - begun:5.1f} s  {line}", flush=True)
            told = line
        if state in ("success", "failed"):
            return state, run_id
        if time.monotonic() - begun > timeout:
            raise AirflowError(f"The run has not ended after {timeout:g} s; logs: {airflow.log_dir}")
        time.sleep(1)


def tagged_rows(s3: S3Server) -> Iterator[dict[str, Any]]:
    """Read the output back, keeping a copy in ``.demo/output``, for the bucket ends with its server."""
    client, prefix = s3.client(), f"pictures-tagged/{DAY}/"
    for found in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []):
        body = client.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read()
        copy = HOME / "output" / found["Key"].removeprefix(prefix)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(body)
        if "/_vlm/" not in f"/{found['Key'].removeprefix(prefix)}":
            text = gzip.decompress(body) if found["Key"].endswith(".gz") else body
            yield from map(json.loads, text.splitlines())


def show(rows: list[dict[str, Any]], drawn: dict[str, Drawing], summary: dict[str, Any] | None) -> None:
    """Print pictures with their tags, the counts, and where everything lies."""
    right = 0
    print(f"\n{'picture':<24}tags")
    for number, row in enumerate(rows):
        (name,), (tags,) = row["images"], row.get("__dj__meta__", {}).get("image_tags", [[]])
        right += tags == drawn[name].tags
        if number < SHOWN:
            note = "" if tags == drawn[name].tags else f"   (drawn: {', '.join(drawn[name].tags)})"
            print(f"{name:<24}{', '.join(tags)}{note}")
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more")
    print(f"\n{right} of {len(drawn)} pictures have exactly the tags that they were drawn with.")
    print("\nThe manifests, summed up:")
    for name, value in (summary or {}).items():
        print(f"  {name:<20}{value}")
    print(f"\nOutput: {DESTINATION}/{DAY}/, copied to {(HOME / 'output').relative_to(ROOT)}/")


def wait_for_interrupt(airflow: AirflowInstance, run_id: str) -> None:
    """Leave everything up until Ctrl-C."""
    print(f"\nAirflow stays up: {airflow.url}/dags/{DAG_ID}/runs/{run_id.replace('+', '%2B')}")
    print("Ctrl-C ends it.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("Ending ...")


if __name__ == "__main__":
    sys.exit(main())
