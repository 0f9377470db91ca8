"""Tag images, then caption them: one plan, and a chain of two steps for each group of shards.

Copy this file and change what stands at its top. A group of shards goes on to its captions when it is tagged,
whatever the others do; the captions' text and the tags stand in the same row then. The plan leaves out the shards of
which both is done.

What tagging writes lies below ``<destination>/_tagged/``: a name that begins with an underscore is no data to whoever
reads the destination.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import DAG, Param, conf, task_group

from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator

SOURCE = "s3://datasets/images"
DESTINATION = "s3://datasets/images-described"
# Where the tasks that ask the model run is configuration. It is named here because the engine is the connection's, which is
# not known when this is parsed. Leave both out for an endpoint that needs no GPU of yours: then any worker will do.
QUEUE = conf.get("vlm", "gpu_queue", fallback="") or conf.get("operators", "default_queue")
POOL = conf.get("vlm", "gpu_pool", fallback="") or "default_pool"

with DAG(
    dag_id="tag_then_caption",
    schedule=None,
    start_date=datetime(2026, 1, 1),
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    params={
        "source": Param(SOURCE, type="string", description="Prefix of the shards"),
        "destination": Param(DESTINATION, type="string", description="Where the described shards go"),
        "max_tasks": Param(100, type="integer", minimum=1, description="Most groups to make of the shards"),
    },
    tags=["vlm"],
    doc_md=__doc__,
) as dag:
    plan = PlanShardsOperator(
        task_id="plan", source="{{ params.source }}", max_tasks="{{ params.max_tasks }}"
    )

    @task_group
    def describe(shards):
        tag = ImageTaggingVLMOperator(
            task_id="tag",
            source="{{ params.source }}",
            shards=shards,
            destination="{{ params.destination.rstrip('/') }}/_tagged",
            queue=QUEUE,
            pool=POOL,
            max_pixels=1024 * 1024,
            # Whole shards, also of those that embed their images: the next step reads them.
            output="full",
        )
        caption = ImageCaptioningOperator(
            task_id="caption",
            source="{{ params.destination.rstrip('/') }}/_tagged",
            shards=shards,
            destination="{{ params.destination }}",
            # The images stay where they are.
            media_roots=["{{ params.source }}"],
            queue=QUEUE,
            pool=POOL,
            max_pixels=1024 * 1024,
            keep_original_sample=False,
            missing_placeholders="prepend",
        )
        tag >> caption

    describe.expand(shards=plan.output)
