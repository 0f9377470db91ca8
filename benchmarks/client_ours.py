"""Ours, through the operator's ``execute`` as a task would call it: shards in, shards and ledger out.

There is no scheduler around it: what Airflow takes to start any task at all is not in the figures.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from client import MODEL, arguments, measured, rows
from without_ledger import without_ledger

CONNECTION = "vlm_bench"


def connection(base_url: str, in_flight: int) -> str:
    extra = {"engine": "openai", "model": MODEL, "max_concurrency": in_flight}
    return json.dumps({"conn_type": "vlm", "host": base_url, "password": "benchmark-key", "extra": extra})


def context() -> dict[str, Any]:
    """As much of a task's context as names who wrote a manifest."""
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    ti = SimpleNamespace(
        dag_id="benchmark", task_id="tag", run_id="benchmark", map_index=-1, try_number=1, xcom_push=print
    )
    return {"ti": ti, "task_instance": ti, "run_id": "benchmark", "logical_date": now, "ts": now.isoformat()}


def tagged_rows(folder: Path) -> int:
    rows = (
        json.loads(line) for shard in folder.glob("part-*.jsonl") for line in shard.open(encoding="utf-8")
    )
    return sum(any(row["__dj__meta__"]["image_tags"]) for row in rows)


def committed(folder: Path) -> bool:
    return any((folder / "_vlm").rglob("manifest.json"))


def tag(source: Path, destination: Path, media_root: Path, **parameters: Any) -> dict[str, Any]:
    from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator

    operator = ImageTaggingVLMOperator(
        task_id="tag",
        source=str(source),
        destination=str(destination),
        media_roots=[str(media_root)],
        vlm_conn_id=CONNECTION,
        **parameters,
    )
    return operator.execute(context())


def main() -> None:
    options = arguments()
    os.environ[f"AIRFLOW_CONN_{CONNECTION.upper()}"] = connection(options.base_url, options.in_flight)
    # Two rows first: the operator imports clients and codecs when it runs, the others before their clock starts.
    source = options.out / "two-rows"
    source.mkdir()
    lines = (json.dumps(row) + "\n" for row in rows(options.data, 2))
    (source / "part-00000.jsonl").write_text("".join(lines), encoding="utf-8")
    destination = options.out / "measured"
    with without_ledger() if options.without_ledger else nullcontext():
        tag(source, options.out / "warm-up", options.data)
        with measured() as figures:
            tag(options.data, destination, options.data)
    if committed(destination) == options.without_ledger:
        raise SystemExit(f"--without-ledger is {options.without_ledger}, but the output says otherwise")
    figures.write(options.result, tagged=tagged_rows(destination))


if __name__ == "__main__":
    main()
