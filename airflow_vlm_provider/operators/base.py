"""What all operators share that take shards through a step: parameters, checks, the run, the report."""

from __future__ import annotations

import asyncio
import gc
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.engines import EngineOptions
from airflow_vlm_provider.operators.parameters import check_partial, refuse_key
from airflow_vlm_provider.operators.placement import PlacedOperator
from airflow_vlm_provider.operators.plans import shards_label

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk import Context
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

    from airflow_vlm_provider.ledger.manifest import Counts, Manifest
    from airflow_vlm_provider.operators.runners import Prepared
    from airflow_vlm_provider.runner import ShardRunner
    from airflow_vlm_provider.steps.base import Step

PROGRESS_SECONDS = 10.0


class ShardOperator(PlacedOperator):
    """
    Base of the operators that take shards through one step.

    Every shard is committed by itself: ``<destination>/<shard>`` in the input's format, and its manifest and dead
    letters under ``<destination>/_vlm/<shard>/<step>/``. A shard whose manifest says that nothing is left to do is
    not read again, nor is the model asked. Returns the sum of the manifests as a small dict.

    :param source: Where the shards are: a prefix or one shard (templated).
    :param shards: Names under ``source``, one or a list: what gets mapped; None takes all (templated).
    :param destination: Where outputs and the ledger go; neither the source nor inside it (templated).
    :param vlm_conn_id: Connection of type ``vlm`` (templated).
    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials (templated).
    :param api_or_hf_model: Model to ask, by the endpoint's name for it or its Hugging Face one; None takes the
        connection's, or else the operator's default: Qwen/Qwen2.5-VL-7B-Instruct, if it names no other (templated).
    :param is_api_model: True asks the connection's endpoint whatever engine the connection names.
    :param engine: ``openai`` (the connection's endpoint), ``vllm`` (a server on the worker, shared by all tasks there
        and started by the first) or ``transformers`` (in the task's own process); None takes the connection's, or else
        ``openai``. With ``vllm`` and ``transformers`` the task goes to ``[vlm] gpu_queue`` and ``gpu_pool`` of Airflow's
        configuration, unless it is given a ``queue`` or ``pool``; with None it goes there only if its ``queue`` says so,
        because what the connection says is not known when a DAG is parsed.
    :param api_endpoint: Path below the base URL that requests go to, or a full URL (``openai`` engine only).
    :param response_path: Where the text stands in the endpoint's answer, as in ``choices.0.message.content``
        (``openai`` engine only).
    :param model_params: With ``vllm``: engine arguments by vLLM's own names; with ``transformers``: arguments for
        loading the model; with ``openai``: further fields of each request's body.
    :param text_key: Field of the text.
    :param image_key: Field of the list of image references.
    :param video_key: Field of the list of video references.
    :param meta_key: Field of the dict that takes generated fields.
    :param image_special_token: What stands in the text for an image.
    :param video_special_token: What stands in the text for a video.
    :param audio_special_token: What stands in the text for a sound.
    :param eoc_special_token: What ends a chunk of the text.
    :param media_roots: Where media may be: ``s3://bucket/prefix/``, folders, ``https://host/path/``, or ``https://``
        for any public host; None allows only what lies where the shards are. A relative reference is looked for
        beside its shard, then below each root (templated).
    :param max_pixels: Shrink larger images to so many pixels (width x height); None sends them as they are.
    :param max_error_rate: Share of failed rows, from 0 to 1, above which the task fails (after committing).
    :param concurrency: Requests in flight; None takes the connection's ``max_concurrency``.
    :param overwrite: Do shards again that are done already. What is known is not asked again all the same.
    :param output: ``full`` writes each shard again with the new fields; ``sidecar`` writes only the new fields, as a
        Parquet file of the shard's stem, so that embedded images are not copied; None takes ``sidecar`` for shards
        that embed their media, and ``full`` for all others.
    :param reuse_from: Further destinations (yesterday's prefix, another table) whose answers count as known, as
        those of this destination always do (templated).
    :param trust_media: Don't look whether a picture was replaced behind an unchanged shard: for stores in which
        nothing is ever replaced.
    :param failed_only: Ask for nothing but the dead letters of shards that are committed, and merge what comes of it
        into the output.
    :param storage_conn_id: Connection for other object stores than S3 (``gs://``, ``abfs://``, ...); None takes the
        one in the URI, or the default one of the scheme (templated).
    """

    template_fields: Sequence[str] = (
        "source",
        "shards",
        "destination",
        "vlm_conn_id",
        "aws_conn_id",
        "api_or_hf_model",
        "media_roots",
        "reuse_from",
        "storage_conn_id",
    )
    ui_color = "#e3d7ff"
    kinds: Sequence[str] | None = None
    """The kinds of dead letters that ``failed_only`` asks again for; None for all."""

    def __init__(
        self,
        *,
        source: str,
        destination: str,
        shards: str | Sequence[str] | None = None,
        vlm_conn_id: str = "vlm_default",
        aws_conn_id: str | None = "aws_default",
        api_or_hf_model: str | None = None,
        is_api_model: bool = False,
        engine: str | None = None,
        api_endpoint: str | None = None,
        response_path: str | None = None,
        model_params: Mapping[str, Any] | None = None,
        text_key: str = "text",
        image_key: str = "images",
        video_key: str = "videos",
        meta_key: str = "__dj__meta__",
        image_special_token: str = "<__dj__image>",
        video_special_token: str = "<__dj__video>",
        audio_special_token: str = "<__dj__audio>",
        eoc_special_token: str = "<|__dj__eoc|>",
        media_roots: Sequence[str] | None = None,
        max_pixels: int | None = None,
        max_error_rate: float = 0.1,
        concurrency: int | None = None,
        overwrite: bool = False,
        output: str | None = None,
        reuse_from: str | Sequence[str] | None = None,
        trust_media: bool = False,
        failed_only: bool = False,
        storage_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_key(kwargs)
        # Not setdefault(): a mapped operator is made with an explicit None.
        if kwargs.get("map_index_template") is None:
            kwargs["map_index_template"] = "{{ shard_name }}"
        super().__init__(engine=engine, **kwargs)
        self.source = source
        self.shards = shards
        self.destination = destination
        self.vlm_conn_id = vlm_conn_id
        self.aws_conn_id = aws_conn_id
        self.api_or_hf_model = api_or_hf_model
        self.is_api_model = is_api_model
        self.api_endpoint = api_endpoint
        self.response_path = response_path
        self.model_params = model_params
        self.text_key = text_key
        self.image_key = image_key
        self.video_key = video_key
        self.meta_key = meta_key
        self.image_special_token = image_special_token
        self.video_special_token = video_special_token
        self.audio_special_token = audio_special_token
        self.eoc_special_token = eoc_special_token
        self.media_roots = media_roots
        self.max_pixels = max_pixels
        self.max_error_rate = max_error_rate
        self.concurrency = concurrency
        self.overwrite = overwrite
        # `output` is what Airflow calls a task's return value.
        self.output_form = output
        self.reuse_from = reuse_from
        self.trust_media = trust_media
        self.failed_only = failed_only
        self.storage_conn_id = storage_conn_id
        self._cancel: Callable[[], object] | None = None
        self._stopped = False

    @abstractmethod
    def make_step(self) -> Step:
        """The step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """

    def engine_options(self) -> EngineOptions:
        """What this operator wants of its engine besides the parameters that all operators have."""
        return EngineOptions()

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Begin a mapped operator; what it is given is checked now, when the DAG is parsed.

        :raises ConfigError: a parameter is wrong.
        """
        check_partial(cls, kwargs)
        return super().partial(**kwargs)

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: jinja2.Environment,
        seen_oids: set[int],
    ) -> None:
        # Airflow calls this one, and not render_template_fields(), also on a mapped task, and renders the map index
        # right after it: so the UI names the shards while the task runs. A template that is only a default of this
        # class does not reach the context of a mapped task by itself.
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)
        names: dict[str, Any] = {"shard_name": self._label(), "map_index_template": self.map_index_template}
        context.update(names)  # type: ignore[typeddict-item]

    def execute(self, context: Context) -> dict[str, Any]:
        """Take the shards through the step.

        :raises AirflowFailException: something only the author can mend; retries would not help.
        :raises AirflowException: too many rows failed, or the engine or a store is gone; a retry may help.
        """
        # Airflow has imported hundreds of thousands of objects, and a full garbage collection walks them all: a
        # tenth of a second, every few hundred requests, in which no answer is read. What is frozen is left out.
        gc.freeze()
        try:
            return self._finish(context, *self._run_in_thread(context))
        except (ConfigError, PermissionError) as error:
            raise AirflowFailException(str(error)) from error
        except AirflowNotFoundException as error:
            raise AirflowFailException(f"{error}. Create the connection, or correct vlm_conn_id.") from error
        except asyncio.CancelledError:
            raise AirflowException(
                "The task was told to stop. Nothing more was sent; shards that were committed stay committed, and "
                "the next run does the rest."
            ) from None
        finally:
            gc.unfreeze()

    def _run_in_thread(self, context: Context) -> tuple[ShardRunner, list[Manifest], list[Manifest]]:
        """Run the event loop in a thread of its own and wait for it.

        Airflow ends a task that takes too long by an exception out of a signal handler. In an event loop that would
        come up wherever the loop happens to be, and get lost there; here it comes up where it is waited for.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="vlm-loop") as threads:
            future = threads.submit(copy_context().run, lambda: asyncio.run(self._run(context)))
            try:
                return future.result()
            except BaseException:
                # Unless it is the run itself that failed, it still runs.
                if not future.done():
                    self.on_kill()
                raise

    def on_kill(self) -> None:
        """Stop sending at once. Airflow calls this from a signal handler and kills the process 5 seconds later."""
        self._stopped = True
        cancel = self._cancel
        if cancel is not None:
            cancel()

    async def _run(self, context: Context) -> tuple[ShardRunner, list[Manifest], list[Manifest]]:
        """Do the shards; returns the runner, the manifests of those that were done before, and the others'."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        try:
            if self._stopped:
                raise asyncio.CancelledError
            prepared = await asyncio.to_thread(self.prepare, context)
            runner, hook, shards = prepared.runner, prepared.hook, prepared.shards
            done = await runner.look_up(shards)
            rest = [shard for shard, manifest in zip(shards, done, strict=True) if manifest is None]
            if len(rest) < len(shards):
                self.log.info("%d of %d shards are done already", len(shards) - len(rest), len(shards))
            fresh: list[Manifest] = []
            for sentence in runner.changes_since_commit():
                self.log.info("%s", sentence)
            if rest:
                self.log.info(
                    "Asking %s (engine %s, connection %s) about %d shards, %d requests in flight",
                    runner.engine.model,
                    type(runner.engine).__name__,
                    hook.vlm_conn_id,
                    len(rest),
                    runner.engine.concurrency,
                )
                try:
                    async with runner.engine:
                        reporter = asyncio.create_task(self._report(runner, context))
                        try:
                            fresh = await runner.run_all(rest)
                        finally:
                            reporter.cancel()
                    await self._show(runner, context)
                finally:
                    # Also of a run in which some shards could not be done.
                    if bound := runner.bottleneck.sentence():
                        self.log.info("%s", bound)
        finally:
            self._cancel = None
        return runner, [manifest for manifest in done if manifest is not None], fresh

    def prepare(self, context: Context) -> Prepared:
        """Make everything that the run needs. Blocks: connections and listings are looked up.

        :raises ConfigError: a parameter is wrong, or a shard is not there.
        """
        from airflow_vlm_provider.operators.runners import prepare

        ti = context["ti"]
        written_by = {
            "dag_id": ti.dag_id,
            "run_id": ti.run_id,
            "task_id": ti.task_id,
            "map_index": ti.map_index,
            "try_number": ti.try_number,
        }
        return prepare(self, written_by=written_by)

    def _label(self) -> str:
        """The shards in a few words."""
        if self.shards is None:
            return self.source.rstrip("/").rpartition("/")[2]
        return shards_label(self.shards)

    async def _report(self, runner: ShardRunner, context: Context) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            await self._show(runner, context)

    async def _show(self, runner: ShardRunner, context: Context) -> None:
        """Say how far the task is, in its log and in the task state store, which the UI shows."""
        self.log.info(runner.progress.line())
        store = context.get("task_state_store")
        if store is None:
            return
        try:
            # In a thread, not by `aset`: cancelled half-way, that would leave its answer for the next message.
            await asyncio.to_thread(store.set, "progress", runner.progress.snapshot())
        except Exception as error:
            self.log.warning("The task state store did not take the progress (%s)", error)

    def _finish(
        self, context: Context, runner: ShardRunner, before: list[Manifest], fresh: list[Manifest]
    ) -> dict[str, Any]:
        """Sum up, tell the outlets, and fail when too much failed."""
        from airflow_vlm_provider.ledger.manifest import Counts
        from airflow_vlm_provider.types import Usage

        counts: Counts = reduce(
            lambda total, each: total + each,
            [*(_as_cached(m.counts, cost=runner.cost(Usage())) for m in before), *(m.counts for m in fresh)],
            Counts(),
        )
        summary: dict[str, Any] = {
            **asdict(counts),
            "model": runner.engine.model,
            "fingerprint": runner.fingerprint,
            "shards": len(before) + len(fresh),
            "shards_unchanged": len(before),
            "source": runner.source.uri,
            "destination": runner.destination.uri,
        }
        summary |= self._extra_summary()
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra.update(summary)
        self.log.info("Done: %s", ", ".join(f"{name} {value}" for name, value in summary.items()))
        if counts.ok and counts.ok == counts.rows_in and not counts.requests:
            self.log.warning(
                "Nothing was asked about any of the %d rows, because none refers to media. Are these their fields: "
                "image_key=%r, video_key=%r?",
                counts.rows_in,
                self.image_key,
                self.video_key,
            )
        rate = counts.failed / counts.rows_in if counts.rows_in else 0.0
        if rate > self.max_error_rate:
            # A failed task returns nothing, but what it did still counts for whoever sums up.
            context["ti"].xcom_push(key="return_value", value=summary)
            errors = [manifest.errors for manifest in fresh if manifest.errors]
            raise AirflowException(
                f"{counts.failed} of {counts.rows_in} rows failed ({rate:.1%}), more than max_error_rate="
                f"{self.max_error_rate:.1%} allows. The shards are committed all the same; the reasons are in "
                f"{', '.join(errors[:3])}{' and more' if len(errors) > 3 else ''}."
            )
        return summary

    def _extra_summary(self) -> dict[str, Any]:
        """What an operator adds to the summary."""
        return {}


def _as_cached(was: Counts, *, cost: float | None) -> Counts:
    """What an earlier run's shard counts for in this one: all there, nothing asked."""
    return replace(
        was,
        ok=0,
        cached=was.ok + was.cached,
        requests=0,
        prompt_tokens=0,
        completion_tokens=0,
        cost_usd=cost,
    )
