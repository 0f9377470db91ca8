from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pytest

from airflow_vlm_provider.ledger.manifest import (
    Counts,
    Manifest,
    UnaccountedError,
    fingerprint,
    load_manifest,
    save_manifest,
)
from airflow_vlm_provider.types import Outcome, Sample, Usage


class MemoryFiles:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def read(self, name: str, *, max_bytes: int) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        stream = io.BytesIO()
        yield stream
        self.files[name] = stream.getvalue()


def manifest(counts: Counts) -> Manifest:
    return Manifest(
        counts=counts,
        model="m",
        fingerprint="f",
        input={"uri": "s3://b/in/a.jsonl", "identity": "1"},
        output={"uri": "s3://b/out/a.jsonl", "identity": "2"},
        errors=None,
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:01+00:00",
        provider_version="0",
        written_by={"dag_id": "d", "run_id": "r", "task_id": "t", "map_index": 3, "try_number": 1},
    )


def test_a_manifest_survives_the_disk_and_has_every_agreed_field():
    files = MemoryFiles()
    written = manifest(Counts(rows_in=3, rows_out=3, ok=1, skipped=1, failed=1, cost_usd=0.25))
    save_manifest(files, "a/b.jsonl", "image_tagging", written)
    assert load_manifest(files, "a/b.jsonl", "image_tagging") == written
    stored = json.loads(files.files["_vlm/a/b.jsonl/image_tagging/manifest.json"])
    assert set(stored) == {
        *("rows_in", "rows_out", "ok", "cached", "skipped", "failed", "requests", "prompt_tokens"),
        *("completion_tokens", "cost_usd", "model", "fingerprint", "input", "output", "errors"),
        *("started_at", "finished_at", "provider_version", "dag_id", "run_id", "task_id", "map_index"),
        *("try_number", "parameters", "kinds", "journal", "media"),
    }


def test_a_commit_that_does_not_add_up_is_refused():
    files = MemoryFiles()
    with pytest.raises(UnaccountedError, match="3 rows were read"):
        save_manifest(files, "a.jsonl", "s", manifest(Counts(rows_in=3, ok=2)))
    assert files.files == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"rows_in": 1}', b"\xff\xfe"])
def test_an_unreadable_manifest_counts_as_none(content):
    files = MemoryFiles()
    files.files["_vlm/a.jsonl/s/manifest.json"] = content
    assert load_manifest(files, "a.jsonl", "s") is None


def test_counts_add_up_and_an_unknown_cost_stays_unknown():
    one = Counts(rows_in=2, ok=2, requests=3, prompt_tokens=10)
    assert (one + one) == Counts(rows_in=4, ok=4, requests=6, prompt_tokens=20)
    assert (one + Counts(cost_usd=0.5)).cost_usd == 0.5
    one.add(
        Outcome(Sample(0, 1, {}, b"{}"), "failed", usage=Usage(requests=2, completion_tokens=7)), rows_out=1
    )
    assert (one.failed, one.rows_out, one.requests, one.completion_tokens) == (1, 1, 5, 7)


def test_fingerprints_differ_by_any_part_and_not_by_order():
    base = fingerprint(step={"a": 1, "b": "x"}, engine={"model": "m"})
    assert base == fingerprint(engine={"model": "m"}, step={"b": "x", "a": 1})
    assert base != fingerprint(step={"a": 1, "b": "x"}, engine={"model": "n"})
    assert base != fingerprint(step={"a": "1", "b": "x"}, engine={"model": "m"})
    assert fingerprint(a={"t": 0, "p": [1]}) == fingerprint(a={"t": 0.0, "p": [1.0]})
    assert fingerprint(a=1) != fingerprint(a=True)
    with pytest.raises(TypeError):
        fingerprint(step={"a": object()})
