"""The commands, called as Airflow's parser calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from typing import Any

import pytest
from airflow.cli.cli_parser import get_parser

from airflow_vlm_provider.cli.ledger import find_ledger
from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.ledger.dead_letters import DeadLetters
from airflow_vlm_provider.ledger.manifest import Counts, Manifest, save_manifest
from airflow_vlm_provider.ledger.segments import SegmentWriter, segment_name
from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.types import Outcome, Sample

BY = {"dag_id": "nightly", "run_id": "monday", "task_id": "tag", "map_index": 7, "try_number": 2}
DAY = 86400


@pytest.fixture(autouse=True)
def _context(monkeypatch):
    # The commands set it for their own process.
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "")


@pytest.fixture
def out(tmp_path):
    """A destination with one shard that is committed, with a dead letter and a segment that nothing refers to."""
    files = open_store(str(tmp_path / "out"))
    names = [segment_name(datetime(2026, 1, day, tzinfo=timezone.utc), "0123abcd", 1) for day in (1, 2)]
    for name in names:
        writer = SegmentWriter({"written_by": BY, "created": "2026-01-01"})
        writer.save(files, f"_vlm/sub/a.jsonl/image_tagging/{name}")
        writer.close()
        old = time.time() - 40 * DAY
        os.utime(tmp_path / "out/_vlm/sub/a.jsonl/image_tagging" / name, (old, old))
    letters = DeadLetters()
    error = SampleError("media_missing", "there is no x.png", media="x.png")
    letters.add(Outcome(Sample(4, 5, {}, b"{}"), "failed", error=error))
    letters.save(files, "sub/a.jsonl", "image_tagging")
    letters.close()
    manifest = Manifest(
        counts=Counts(rows_in=1200, rows_out=1200, ok=1199, failed=1, requests=1300, cost_usd=1.25),
        model="some/model",
        fingerprint="f",
        input={"uri": "s3://b/in/sub/a.jsonl", "identity": "1"},
        output={"uri": "s3://b/out/sub/a.jsonl", "identity": "2"},
        errors="e",
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:01:00+00:00",
        provider_version="0.1.0",
        parameters={"step": {"name": "image_tagging", "system_prompt": "x" * 500}},
        kinds={"media_missing": 1},
        journal=[names[0]],
        written_by=BY,
    )
    save_manifest(files, "sub/a.jsonl", "image_tagging", manifest)
    return tmp_path / "out"


def run(*argv: Any) -> None:
    args = get_parser().parse_args(["vlm", "ledger", *map(str, argv)])
    args.func(args)


def test_a_shard_is_shown_for_people(out, capsys):
    run("show", out / "sub" / "a.jsonl")
    said = capsys.readouterr().out
    assert said.startswith(f"sub/a.jsonl in file://{out}/\n")
    for words in (
        "DAG nightly, run monday, task tag [7], try 2, version 0.1.0",
        "1,200 in, 1,200 out: 1,199 ok",
        "1,300 requests",
        "1.2500 US dollars",
        "some/model",
        "2 segments",
        "0 answers, written 2026-01-01, by DAG nightly",
        "not in the manifest",
        "1: 1 media_missing",
        "row 4 (line 5), media_missing x.png: there is no x.png (0 attempts, first ",
    ):
        assert words in said, words
    assert said.count("not in the manifest") == 1
    assert "x" * 101 not in said
    run("show", out / "sub" / "a.jsonl", "--verbose")
    assert "x" * 500 in capsys.readouterr().out


def test_a_shard_is_shown_for_machines(out, capsys):
    run("show", f"file://{out}/sub/a.jsonl", "--output", "json")
    shown = json.loads(capsys.readouterr().out)
    (step,) = shown["steps"]
    assert (shown["shard"], step["step"], step["manifest"]["rows_in"]) == (
        "sub/a.jsonl",
        "image_tagging",
        1200,
    )
    assert step["dead_letters"] == {"media_missing": 1}
    assert step["first_dead_letters"][0]["media"] == "x.png"
    assert [each["referred"] for each in step["segments"]] == [True, False]
    assert step["segments"][0]["header"]["written_by"] == BY


def test_a_destination_is_shown_as_a_table_with_sums(out, capsys):
    (out / "_vlm/b.jsonl/image_tagging").mkdir(parents=True)
    (out / "_vlm/b.jsonl/image_tagging/manifest.json").write_text("{")
    run("show", out)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["shard", "step", "rows", "ok", "cached", "skipped"]
    assert rows[0].split()[:2] == ["b.jsonl", "image_tagging"]
    assert rows[1].split()[:4] == ["sub/a.jsonl", "image_tagging", "1,200", "1,199"]
    assert rows[2].split()[:4] == ["1", "shard", "image_tagging", "1,200"]
    assert rows[3].startswith("b.jsonl (image_tagging): the manifest is damaged")
    run("show", out, "-o", "json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["totals"] == {
        "image_tagging": {
            **{"shards": 1, "rows_in": 1200, "rows_out": 1200, "ok": 1199, "cached": 0, "skipped": 0},
            **{"failed": 1, "requests": 1300, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 1.25},
        }
    }
    assert [each["commit"] is None for each in shown["shards"]] == [True, False]


def test_pruning_says_what_it_would_do_and_does_it(out, capsys):
    journal = out / "_vlm/sub/a.jsonl/image_tagging/journal"
    run("prune", out, "--older-than", 30, "--dry-run", "--verbose")
    said = capsys.readouterr().out
    assert "sub/a.jsonl (image_tagging): 1 segment, " in said
    assert "Would remove 1 journal segment (" in said
    assert len(list(journal.iterdir())) == 2
    run("prune", out, "--older-than", 30)
    assert capsys.readouterr().out.startswith("Removed 1 journal segment (")
    assert [each.name for each in journal.iterdir()] == ["20260101T000000000000-0123abcd-0001.jsonl.zst"]
    run("prune", out, "--older-than", 30, "-o", "json")
    assert json.loads(capsys.readouterr().out)["segments"] == 0


def test_pruning_ends_in_an_error_when_it_had_to_leave_something(out, capsys):
    (out / "_vlm/sub/a.jsonl/image_tagging/manifest.json").write_text("{")
    with pytest.raises(SystemExit, match="1 shards were left as they are"):
        run("prune", out, "--older-than", 30)
    assert "sub/a.jsonl (image_tagging) is left as it is" in capsys.readouterr().out
    assert len(list((out / "_vlm/sub/a.jsonl/image_tagging/journal").iterdir())) == 2


@pytest.mark.parametrize("days", ["0", "0.99", "-3", "nan"])
def test_too_short_an_age_is_refused_because_running_tasks_have_not_committed_yet(out, days):
    with pytest.raises(SystemExit, match="at least 1 day"):
        run("prune", out, "--older-than", days)


def test_a_place_without_a_ledger_is_told_and_left_alone(tmp_path):
    with pytest.raises(SystemExit, match="There is no ledger at"):
        run("show", tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(SystemExit, match="There is no ledger at"):
        run("prune", tmp_path / "nowhere", "--older-than", 30)
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_was_named_and_is_not_there_is_told(out):
    for option in ("--aws-conn-id", "--storage-conn-id"):
        with pytest.raises(SystemExit, match="nope"):
            run("show", out, option, "nope")


def test_a_shard_is_found_below_its_destination_and_not_beside_it(out, monkeypatch):
    def find(uri: str) -> tuple[str, str | None]:
        store, shard = find_ledger(uri, open_store)
        return store.uri, shard

    root = f"file://{out}/"
    assert find(str(out)) == find(f"{out}/") == (root, None)
    assert find(f"{out}/sub/a.jsonl") == (root, "sub/a.jsonl")
    monkeypatch.chdir(out)
    assert find("sub/a.jsonl") == (root, "sub/a.jsonl")
    for absent in ("a.jsonl", "sub", "sub/a.jsonl/image_tagging"):
        with pytest.raises(ConfigError, match="no ledger"):
            find(f"{out}/{absent}")


def test_what_every_airflow_command_imports_of_it_is_next_to_nothing():
    code = """
import sys
import airflow.cli.cli_parser
before = set(sys.modules)
import airflow_vlm_provider.cli.definition
assert airflow_vlm_provider.cli.definition.get_vlm_cli_commands()
print(sorted(name for name in sys.modules if name.startswith("airflow_vlm_provider")))
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, more = done.stdout.splitlines()[-2:]
    assert set(json.loads(ours.replace("'", '"'))) <= {
        "airflow_vlm_provider",
        "airflow_vlm_provider.cli",
        "airflow_vlm_provider.cli.definition",
        "airflow_vlm_provider.get_provider_info",
    }
    assert more == "[]"
