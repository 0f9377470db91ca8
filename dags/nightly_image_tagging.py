"""Tag last night's images: plan -> tag (mapped over groups of shards) -> summary.

Copy this file and change what stands at its top. It expects a connection ``vlm_default`` of type "Vision-language
model" and, for S3, a connection ``aws_default``. The day's shards are read from ``<source>/<day>/`` and tagged
copies written to ``<destination>/<day>/``, so that a backfill works on its own days. Pictures that the day before had
too are not asked about again, and neither is anything in a day that is cleared or backfilled once more.

The tagging tasks run where ``[vlm] gpu_queue`` and ``[vlm] gpu_pool`` say.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import DAG, Asset, Param, conf, task
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator

SOURCE = "s3://datasets/images"
DESTINATION = "s3://datasets/images-tagged"
# Where the tasks that ask the model run is configuration. It is named here because the engine is the connection's, which is
# not known when this is parsed. Leave both out for an endpoint that needs no GPU of yours: then any worker will do.
QUEUE = conf.get("vlm", "gpu_queue", fallback="") or conf.get("operators", "default_queue")
POOL = conf.get("vlm", "gpu_pool", fallback="") or "default_pool"

with DAG(
    dag_id="nightly_image_tagging",
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=2,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    params={
        "source": Param(SOURCE, type="string", description="Prefix with one folder of shards a day"),
        "destination": Param(DESTINATION, type="string", description="Where the tagged shards go"),
        "day": Param(
            None,
            type=["null", "string"],
            format="date",
            description="Day to tag, as its folder is named (YYYY-MM-DD); empty takes the run's logical date",
        ),
        "max_tasks": Param(
            200, type="integer", minimum=1, description="Most tasks to spread the shards over"
        ),
        "max_error_rate": Param(
            0.1, type="number", minimum=0, maximum=1, description="Share of rows that may fail"
        ),
    },
    tags=["vlm"],
    doc_md=__doc__,
) as dag:
    # A run that was triggered by hand or by an asset may have no logical date.
    day = "params.day or (dag_run.logical_date or dag_run.run_after) | ds"
    source = "{{ params.source }}/{{ " + day + " }}/"
    destination = "{{ params.destination }}/{{ " + day + " }}/"
    day_before = "{{ params.destination }}/{{ macros.ds_add(" + day + ", -1) }}/"

    plan = PlanShardsOperator(task_id="plan", source=source, max_tasks="{{ params.max_tasks }}")

    tag = ImageTaggingVLMOperator.partial(
        task_id="tag",
        source=source,
        destination=destination,
        # Many pictures of a day were there the day before; their answers are in its journals.
        reuse_from=[day_before],
        # One bad group must not hide what the others did: the summary judges the whole.
        max_error_rate=1.0,
        max_pixels=1024 * 1024,
        # By name alone: for a URI, Airflow imports every provider that knows some kind of URI whenever it parses this.
        outlets=[Asset("tagged_images")],
        queue=QUEUE,
        pool=POOL,
    ).expand(shards=plan.output)

    @task(trigger_rule="all_done")
    def summary(params: dict | None = None, ti=None) -> dict:
        """Add the groups up, and fail when too much failed or did not run."""
        plan = ti.xcom_pull(task_ids="plan")
        if plan is None:
            raise AirflowFailException("There is no plan, so nothing was tagged; look at the task 'plan'.")
        # By their numbers, and not by tag.output: when a run is cleared, its plan may have fewer groups than before,
        # and what the tasks returned that it has no more is still there.
        returned = ti.xcom_pull(task_ids="tag", map_indexes=range(len(plan)))
        manifests = [each for each in returned if each is not None]
        groups = len(manifests)
        # The plan leaves out what earlier runs have done; it counts all the same, and so do its failures.
        manifests += (ti.xcom_pull(task_ids="plan", key="done") or {}).values()
        counts = ("shards", "shards_unchanged", "rows_in", "rows_out", "ok", "cached", "skipped", "failed")
        costs = ("requests", "prompt_tokens", "completion_tokens", "cost_usd")
        # A cost that nobody knows (the connection names no prices) is left out.
        total = {
            name: sum(manifest[name] for manifest in manifests)
            for name in counts + costs
            if all(manifest[name] is not None for manifest in manifests)
        }
        print(f"{groups} of {len(plan)} groups: {total}" if plan else f"All was done already: {total}")
        if groups < len(plan):
            raise AirflowFailException(
                f"Only {groups} of {len(plan)} groups finished; look at the failed 'tag' tasks and clear them."
            )
        if total["failed"] > params["max_error_rate"] * total["rows_in"]:
            raise AirflowFailException(
                f"{total['failed']} of {total['rows_in']} rows failed, more than max_error_rate="
                f"{params['max_error_rate']} allows; the reasons are in the errors.jsonl files below _vlm/."
            )
        return total

    # After the plan, too: tasks that an earlier plan mapped and this one does not count as done before it is made.
    [plan, tag] >> summary()
