"""The index of request keys of one step, and keys and segments to put into it."""

from __future__ import annotations

from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.memory_files import MemoryFiles

STEP = "image_tagging"
FOLDER = f"_vlm/_index/{STEP}/keys"


def key(number: int) -> str:
    """A key by its number: as random keys do, small numbers spread over the whole range."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def segment(shard: int, time: int) -> str:
    """The name of a segment that a commit of the shard wrote at that time."""
    return f"_vlm/{shard}.jsonl/{STEP}/journal/20260101T{time:012}-0123abcd-0001-all.jsonl.zst"


def index(files: MemoryFiles | LocalStore) -> KeyIndex:
    """The index, of which nothing has been read yet."""
    return KeyIndex(files, step=STEP)


def loaded(files: MemoryFiles | LocalStore) -> KeyIndex:
    """The index as whoever comes next reads it."""
    fresh = index(files)
    fresh.load()
    return fresh
