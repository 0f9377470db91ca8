"""Which shards below a destination have dead letters, grouped by the question that they failed at.

Dead letters of other shards than those of the newest commits are not looked at: a manifest says how many rows failed
and of what kinds, and a shard without any has an empty ``errors.jsonl`` or none, which its listing already tells.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from airflow_vlm_provider.ledger.manifest import Files, Manifest, load_manifest
from airflow_vlm_provider.ledger.tree import Place, walk

log = logging.getLogger(__name__)

THREADS = 16
# Manifests that are held in memory at once.
BATCH_SHARDS = 256


@dataclass(frozen=True, slots=True)
class FailedShard:
    """A shard with dead letters.

    :param failed: How many.
    :param chosen: How many of the kinds in question.
    """

    name: str
    failed: int
    chosen: int


@dataclass(frozen=True, slots=True)
class FailedGroup:
    """Shards that were taken through the same step, with the same parameters, from the same source.

    :param source: URI of the place that the shards were read from, with a trailing slash.
    :param parameters: As the manifests have them.
    :param shards: By their names.
    """

    step: str
    source: str
    parameters: Mapping[str, Any]
    shards: dict[str, FailedShard] = field(default_factory=dict)


def failed_groups(
    files: Files,
    *,
    step: str | None = None,
    shards: Collection[str] | None = None,
    kinds: Collection[str] | None = None,
) -> list[FailedGroup]:
    """Find the shards that have dead letters.

    :param files: A destination.
    :param step: Only under the step of this name.
    :param shards: Only of these names.
    :param kinds: Only with dead letters of these kinds.
    :raises ConnectionError, PermissionError, VLMError: the destination can't be read.
    """
    wanted = None if shards is None else frozenset(shards)
    groups: dict[tuple[str, str, str], FailedGroup] = {}
    places = (
        each.place
        for each in walk(files)
        if each.file == "errors.jsonl"
        and each.info.size
        and step in (None, each.place.step)
        and (wanted is None or each.place.shard in wanted)
    )
    with ThreadPoolExecutor(THREADS, thread_name_prefix="vlm-failed") as threads:
        while batch := list(itertools.islice(places, BATCH_SHARDS)):
            manifests = threads.map(lambda place: load_manifest(files, *place), batch)
            for place, manifest in zip(batch, manifests, strict=True):
                _sort_in(groups, place, manifest, kinds)
    return list(groups.values())


def _sort_in(
    groups: dict[tuple[str, str, str], FailedGroup],
    place: Place,
    manifest: Manifest | None,
    kinds: Collection[str] | None,
) -> None:
    if manifest is None:
        log.warning(
            "%s (%s) has dead letters of a run that was never committed, or a damaged manifest: run its operator",
            *place,
        )
        return
    chosen = sum(number for kind, number in manifest.kinds.items() if kinds is None or kind in kinds)
    if not chosen:
        return
    source = manifest.input["uri"].removesuffix(place.shard)
    key = (place.step, source, manifest.fingerprint)
    if key not in groups:
        groups[key] = FailedGroup(place.step, source, manifest.parameters)
    groups[key].shards[place.shard] = FailedShard(place.shard, manifest.counts.failed, chosen)
