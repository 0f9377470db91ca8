"""What all shards of one run have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_vlm_provider.answering import Answering
    from airflow_vlm_provider.bottleneck import Bottleneck
    from airflow_vlm_provider.engines.window import Window as Requests
    from airflow_vlm_provider.ledger.answers import Answers
    from airflow_vlm_provider.ledger.commit_index import CommitIndex
    from airflow_vlm_provider.ledger.keys import RequestKeys
    from airflow_vlm_provider.ledger.write_behind import Window
    from airflow_vlm_provider.progress import Progress
    from airflow_vlm_provider.shards.formats import RowKeys
    from airflow_vlm_provider.shards.media import MediaLoader
    from airflow_vlm_provider.shards.stores import Store
    from airflow_vlm_provider.steps.base import Step
    from airflow_vlm_provider.types import Usage


@dataclass(frozen=True)
class Job:
    """What all shards of one run have in common.

    :param model: The model that is asked.
    :param fingerprint: Of the parameters, for the manifests.
    :param parameters: Of step, engine, media and output, for the manifests.
    :param cost: US dollars for a usage; None when prices are not known.
    :param written_by: Who runs this, for the manifests.
    :param answers: What is known.
    :param commits: The commit index of the destination.
    :param keys: Makes requests' keys.
    :param window: When answers are written to the journals, and how many may wait for it.
    :param row_keys: What the fields are called that a format makes.
    :param output: ``full``, ``sidecar``, or None for what suits the shard.
    :param trust_media: Take media that were loaded before for unchanged.
    :param failed_only: Ask for nothing but dead letters.
    :param kinds: The kinds of dead letters that ``failed_only`` tries again; None for all.
    :param max_error_rate: Share of failed rows above which a shard's answers of no use are asked for anew.
    :param bottleneck: Counts what is waited for.
    :param threads: Where rows and media are read.
    :param writers: Where everything is written: what was paid for must not wait behind media that are slow to come.
    :param active: Bounds the samples that are worked on at once.
    :param loaded: Bounds the requests whose media are in memory, by what the engine takes.
    """

    step: Step
    source: Store
    destination: Store
    media: MediaLoader
    model: str
    fingerprint: str
    parameters: Mapping[str, Any]
    cost: Callable[[Usage], float | None]
    written_by: Mapping[str, Any]
    answers: Answers
    answering: Answering
    commits: CommitIndex
    keys: RequestKeys
    window: Window
    row_keys: RowKeys
    output: str | None
    trust_media: bool
    failed_only: bool
    kinds: frozenset[str] | None
    max_error_rate: float
    progress: Progress
    bottleneck: Bottleneck
    threads: Executor
    writers: Executor
    active: asyncio.Semaphore
    loaded: Requests
