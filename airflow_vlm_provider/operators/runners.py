"""From an operator's parameters to the runner that takes shards through its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow.sdk import conf

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.destination import check_destination
from airflow_vlm_provider.operators.engines import make_engine
from airflow_vlm_provider.operators.parameters import check_parameters
from airflow_vlm_provider.operators.plans import resolve_shards
from airflow_vlm_provider.operators.storage import Storage, find_shards

if TYPE_CHECKING:
    from airflow_vlm_provider.hooks.vlm import VLMHook
    from airflow_vlm_provider.ledger.journal import FlushPolicy
    from airflow_vlm_provider.operators.base import ShardOperator
    from airflow_vlm_provider.runner import ShardRunner
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store


@dataclass(frozen=True)
class Prepared:
    """What a task's run needs, all of it looked up.

    :param shards: The shards to take through the step.
    """

    runner: ShardRunner
    hook: VLMHook
    shards: list[ObjectInfo]


def prepare(operator: ShardOperator, *, written_by: Mapping[str, Any]) -> Prepared:
    """Make everything that a run needs. Blocks: connections and listings are looked up.

    :param operator: The operator, its template fields rendered.
    :param written_by: Who runs this, for the manifests.
    :raises ConfigError: a parameter is wrong, or a shard is not there.
    """
    check_parameters(operator)
    storage = storage_of(operator)
    names = resolve_shards(operator.shards, open_store=storage.open_store)
    source, shards = find_shards(operator.source, names, storage=storage)
    runner, hook = make_runner(operator, source=source, storage=storage, written_by=written_by)
    # Once more: a source that is one shard lies in the folder that is compared here.
    same = runner.destination.uri == source.uri
    check_destination(source.uri if same else operator.source, operator.destination)
    return Prepared(runner, hook, shards)


def storage_of(operator: ShardOperator) -> Storage:
    """The object stores, as the operator's connections reach them."""
    return Storage(aws_conn_id=operator.aws_conn_id, storage_conn_id=operator.storage_conn_id)


def make_runner(
    operator: ShardOperator, *, source: Store, storage: Storage, written_by: Mapping[str, Any]
) -> tuple[ShardRunner, VLMHook]:
    """Make the runner of an operator's step, and the hook that its engine is connected by. Loads no model.

    :param source: Where the shards are.
    :raises ConfigError: a parameter or the connection is wrong.
    """
    from airflow_vlm_provider.hooks.vlm import VLMHook
    from airflow_vlm_provider.runner import ShardRunner
    from airflow_vlm_provider.shards.formats import RowKeys
    from airflow_vlm_provider.shards.media import MediaLoader

    hook = VLMHook(operator.vlm_conn_id)
    engine = make_engine(
        hook,
        engine="openai" if operator.is_api_model else operator.engine,
        model=operator.api_or_hf_model,
        concurrency=operator.concurrency,
        api_endpoint=operator.api_endpoint,
        response_path=operator.response_path,
        model_params=operator.model_params,
        options=operator.engine_options(),
        holder=written_by,
    )
    media = MediaLoader(
        source_uri=source.uri,
        roots=operator.media_roots,
        max_pixels=operator.max_pixels,
        s3_client=storage.s3_client,
        filesystem=storage.filesystem,
    )
    runner = ShardRunner(
        step=operator.make_step(),
        engine=engine,
        source=source,
        destination=storage.open_store(operator.destination),
        media=media,
        reuse=[storage.open_store(uri) for uri in _uris(operator.reuse_from)],
        flush=flush_policy(),
        row_keys=RowKeys(
            text=operator.text_key,
            image=operator.image_key,
            video=operator.video_key,
            objects=frozenset({operator.meta_key}),
        ),
        output=operator.output_form,
        trust_media=operator.trust_media,
        failed_only=operator.failed_only,
        kinds=operator.kinds,
        max_error_rate=operator.max_error_rate,
        prices=hook.settings.prices,
        written_by=written_by,
        overwrite=operator.overwrite,
    )
    return runner, hook


def flush_policy() -> FlushPolicy:
    """When answers are written to the journal, as ``[vlm]`` in Airflow's configuration says.

    :raises ConfigError: a value is not above 0.
    """
    from airflow_vlm_provider.ledger.journal import FlushPolicy

    default = FlushPolicy()
    try:
        return FlushPolicy(
            answers=conf.getint("vlm", "journal_flush_answers", fallback=default.answers),
            bytes=conf.getint("vlm", "journal_flush_bytes", fallback=default.bytes),
            seconds=conf.getfloat("vlm", "journal_flush_seconds", fallback=default.seconds),
        )
    except ValueError as error:
        raise ConfigError(f"Airflow's configuration, section [vlm]: {error}") from error


def _uris(reuse_from: str | Sequence[str] | None) -> list[str]:
    if reuse_from is None:
        return []
    return [reuse_from] if isinstance(reuse_from, str) else list(reuse_from)
