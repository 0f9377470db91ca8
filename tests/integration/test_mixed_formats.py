"""Sources of all formats at once: redriven, killed, on other stores, and by the ledger's commands."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from airflow_vlm_provider.cli.definition import get_vlm_cli_commands
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from tests.support.places import Files
from tests.support.stub_endpoint import tag_of
from tests.support.tagging_world import (
    FIELD,
    META,
    STEP,
    World,
    context,
    letters,
    manifest,
    packed,
    picture,
    start_world,
)
from tests.support.tars import tar
from tests.support.task_processes import start_tasks

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_world() as world:
        yield world


@pytest.fixture
def bucket(world: World) -> Files:
    return world.bucket()


@pytest.fixture(autouse=True)
def _as_new(world: World, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.stub.set(image_faults={}, latency=0.0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def mixed_source(place: Files, tmp_path: Any, name: str, *, rows: int = 6) -> list[str]:
    """A shard in each of four formats, with pictures of their own; returns the shards' names."""
    pictures = {
        form: [picture(f"{name}-{form}-{number}") for number in range(rows)] for form in ("t", "h", "r", "j")
    }
    place.put(
        "t.tar.gz", packed(tar(*((f"{i}.png", data) for i, data in enumerate(pictures["t"]))), ".tar.gz")
    )
    hugging = datasets.Dataset.from_dict(
        {"images": [[{"bytes": data, "path": None}] for data in pictures["h"]]},
        features=datasets.Features({"images": [datasets.Image()]}),
    )
    hugging.to_parquet(str(tmp_path / "h.parquet"), batch_size=2)
    place.put("h.parquet", (tmp_path / "h.parquet").read_bytes())
    for form in ("r", "j"):
        for number, data in enumerate(pictures[form]):
            place.put(f"img/{form}{number}.png", data)
    references = {form: [[f"img/{form}{number}.png"] for number in range(rows)] for form in ("r", "j")}
    stream = io.BytesIO()
    pq.write_table(pa.table({"images": references["r"]}), stream, row_group_size=2)
    place.put("r.parquet", stream.getvalue())
    lines = "".join(json.dumps({"images": each}) + "\n" for each in references["j"])
    place.put("j.jsonl.zst", packed(lines.encode(), ".zst"))
    return ["h.parquet", "j.jsonl.zst", "r.parquet", "t.tar.gz"]


def test_the_same_picture_in_any_format_is_asked_about_once(world, bucket):
    same = picture("in-all-formats")
    bucket.put("in/a.tar", tar(("x.png", same)))
    stream = io.BytesIO()
    pq.write_table(
        pa.table({"images": [[{"bytes": same, "path": "x.png"}], [{"bytes": same, "path": None}]]}), stream
    )
    bucket.put("in/b.parquet", stream.getvalue())
    bucket.put("in/c.jsonl", b'{"images": ["x/y.png", "x/y.png"]}\n')
    bucket.put("in/x/y.png", same)
    summary, asked = world.tag_counted(bucket / "in", bucket / "out")
    assert (asked, summary["rows_in"], summary["requests"], summary["failed"]) == (1, 4, 1, 0)


@pytest.mark.parametrize("output", [None, "full"])
def test_dead_letters_of_every_format_are_redriven_and_merged(world, bucket, tmp_path, output):
    name = f"redriven-{output}"
    shards = mixed_source(bucket / "in", tmp_path, name, rows=4)
    refused = {tag_of(picture(f"{name}-{form}-2")).removeprefix("img-"): "refusal" for form in "thrj"}
    world.stub.set(image_faults=refused)
    given = {"output": output, "try_num": 1}
    summary = world.tag(bucket / "in", bucket / "out", **given)
    assert (summary["rows_in"], summary["failed"], summary["ok"]) == (16, 4, 12)
    for shard in shards:
        assert letters(bucket / "out", shard) == [(2, "refused")]
    world.stub.set(image_faults={})
    before = world.asked()

    some = world.tag(bucket / "in", bucket / "out", failed_only=True, shards=["t.tar.gz"], **given)
    rest = RedriveOperator(task_id="r", destination=str(bucket / "out")).execute(context())

    assert world.asked() - before == 4
    assert (some["requests"], some["failed"], some["rows_in"]) == (1, 0, 4)
    assert (rest["redriven"], rest["recovered"], rest["shards"], rest["rows_in"]) == (3, 3, 3, 12)
    world.tag(bucket / "in", bucket / "undisturbed", overwrite=True, **given)
    assert (bucket / "out").everything() == (bucket / "undisturbed").everything()
    assert all(manifest(bucket / "out", shard)["failed"] == 0 for shard in shards)
    assert world.tag_counted(bucket / "in", bucket / "out", **given)[1] == 0


@pytest.fixture(scope="module")
def tasks(world, tmp_path_factory):
    with start_tasks(world.environment, tmp_path_factory.mktemp("tasks")) as tasks:
        yield tasks


@pytest.mark.parametrize("output", [None, "full"])
def test_killed_in_the_middle_every_format_ends_as_if_it_had_not_been(world, bucket, tasks, tmp_path, output):
    shards = mixed_source(bucket / "in", tmp_path, f"killed-{output}", rows=10)
    world.stub.set(latency=0.1)
    before = world.asked()
    task = tasks.start(source=f"{bucket}/in", destination=f"{bucket}/out", output=output)
    while world.asked() - before < 28 and not task.ended():
        time.sleep(0.01)
    os.kill(task.pid, signal.SIGKILL)
    assert task.wait() == -signal.SIGKILL, task.said()
    world.stub.set(latency=0)
    summary = world.tag(bucket / "in", bucket / "out", output=output)
    assert (summary["rows_in"], summary["failed"]) == (40, 0)
    assert summary["cached"] > 0
    world.tag(bucket / "in", bucket / "undisturbed", output=output)
    assert (bucket / "out").everything() == (bucket / "undisturbed").everything()
    assert len((bucket / "out").names()) == len(shards)
    assert world.tag_counted(bucket / "in", bucket / "out", output=output)[1] == 0


# ---------------------------------------------------------------- other stores


@pytest.fixture(params=["memory", "sftp"])
def elsewhere(request, tmp_path, monkeypatch):
    """A place that is only reached by fsspec: one where a put is atomic, and one that moves files."""

    class Moving(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("sftp://server"))

    def filesystem(scheme: str, *_: Any, **__: Any) -> Any:
        return MemoryFileSystem() if scheme == "memory" else Moving()

    monkeypatch.setattr("airflow.sdk.io.store._STORE_CACHE", {})
    monkeypatch.setattr("airflow.sdk.io.get_fs", filesystem)
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"sftp://server{tmp_path}"
    return Files(root, filesystem=lambda uri: filesystem(uri.partition(":")[0]))


def test_all_formats_on_other_stores(world, elsewhere, tmp_path):
    source, out = elsewhere / "in", elsewhere / "out"
    shards = mixed_source(source, tmp_path, f"elsewhere-{elsewhere}", rows=4)
    plan = PlanShardsOperator(task_id="plan", source=str(source), max_tasks=2)
    groups = plan.execute(context())
    assert sorted(name for group in groups for name in group) == shards

    sums = [world.tag_counted(source, out, shards=group) for group in groups]

    assert sum(asked for _, asked in sums) == sum(each["rows_in"] for each, _ in sums) == 16
    assert out.names() == ["h.parquet", "j.jsonl.zst", "r.parquet", "t.parquet"]
    assert world.tag_counted(source, out)[1] == 0
    source.put("img/j1.png", picture("elsewhere-new"))
    summary, asked = world.tag_counted(source, out)
    assert (asked, summary["failed"]) == (1, 0)
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(out.get("j.jsonl.zst")).splitlines()
    assert json.loads(lines[1])[META][FIELD][0][0] == tag_of(picture("elsewhere-new"))
    # From there to S3 and back, what is known stays known.
    bucket = world.bucket()
    assert world.tag_counted(source, bucket / "out", reuse_from=str(out))[1] == 0
    for name, data in source.everything().items():
        bucket.put(f"in/{name}", data)
    assert world.tag_counted(bucket / "in", elsewhere / "again", reuse_from=f"{bucket}/out")[1] == 0
    assert (elsewhere / "again").everything() == out.everything()


# ---------------------------------------------------------------- the ledger's commands


def ledger(command: str, *argv: str) -> dict[str, Any]:
    """What ``airflow vlm ledger`` prints for machines."""
    (vlm,) = get_vlm_cli_commands()
    (group,) = [each for each in vlm.subcommands if each.name == "ledger"]
    (chosen,) = [each for each in group.subcommands if each.name == command]
    parser = argparse.ArgumentParser()
    for each in chosen.args:
        each.add_to_parser(parser)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        chosen.func(parser.parse_args([*argv, "--output", "json"]))
    return json.loads(out.getvalue())


def test_after_several_runs_show_tells_the_truth_and_prune_leaves_what_is_needed(
    world, tasks, tmp_path, monkeypatch
):
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")
    source, out = Files(f"file://{tmp_path}/in"), Files(f"file://{tmp_path}/out")
    shards = mixed_source(source, tmp_path, "pruned", rows=12)
    refused = [tag_of(picture(f"pruned-{form}-3")).removeprefix("img-") for form in "hj"]
    world.stub.set(image_faults=dict.fromkeys(refused, "refusal"))
    old = {"input_template": "What is it?", "try_num": 1}
    new = {"input_template": "What do you see?", "try_num": 1}
    world.tag(source, out, **old)
    world.stub.set(latency=0.05)
    before = world.asked()
    # An attempt that never committed, whose answers nobody refers to.
    task = tasks.start(source=str(source), destination=str(out), **new)
    while world.asked() - before < 30 and not task.ended():
        time.sleep(0.01)
    os.kill(task.pid, signal.SIGKILL)
    assert task.wait() == -signal.SIGKILL, task.said()
    world.stub.set(latency=0)
    world.tag(source, out, **new)
    world.tag(source, out, overwrite=True, **old)
    world.tag(source, out, **new)

    shown = ledger("show", str(out))
    assert [each["shard"] for each in shown["shards"]] == shards
    assert (shown["totals"][STEP]["rows_in"], shown["totals"][STEP]["failed"]) == (48, 2)
    for shard in shards:
        one = ledger("show", f"{out}/{shard}")
        (step,) = one["steps"]
        assert one["shard"] == shard
        assert step["manifest"] == manifest(out, shard)
        assert dict(step["dead_letters"]) == step["manifest"]["kinds"]
        failed = [] if step["manifest"]["errors"] is None else [row for row, _ in letters(out, shard)]
        assert [each["row"] for each in step["first_dead_letters"]] == failed
        assert len(failed) == step["manifest"]["failed"]
        listed = out.names(f"_vlm/{shard}/{STEP}/journal")
        assert [f"_vlm/{shard}/{STEP}/{each['name']}" for each in step["segments"]] == listed
        referred = [each["name"] for each in step["segments"] if each["referred"]]
        assert referred == sorted(step["manifest"]["journal"])
        held = sum(each["answers"] for each in step["segments"] if each["referred"])
        assert held >= step["manifest"]["rows_in"]

    assert ledger("prune", str(out), "--older-than", "30")["segments"] == 0, "nothing is that old"
    long_ago = time.time() - 40 * 86400
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    would = ledger("prune", str(out), "--older-than", "30", "--dry-run")
    before_pruning = out.names("_vlm")
    pruned = ledger("prune", str(out), "--older-than", "30")
    assert {**would, "dry_run": False} == pruned
    assert pruned["segments"] > 0
    gone = set(before_pruning) - set(out.names("_vlm"))
    assert gone == {name for each in pruned["shards"] for name in each["segments"]}
    assert pruned["left_as_they_are"] == []

    assert world.tag_counted(source, out, **new)[1] == 0
    again = world.tag(source, out, overwrite=True, **new)
    assert (again["requests"], again["rows_in"]) == (0, 48)
    # Other shards find them, too.
    everything = {f"moved/{name}": data for name, data in source.everything().items()}
    for name, data in everything.items():
        source.put(name, data)
    moved = world.tag(source / "moved", out, **new)
    assert (moved["requests"], moved["rows_in"], moved["cached"]) == (0, 48, 46)
