"""Write instruction data about images with a hosted chat model: reasoning, description and conversation.

Copy this file and change what stands at its top. The connection ``vlm_default`` names endpoint, model and API key.
One plan serves the three tasks: for each image they write a question that needs reasoning with its answer, a detailed
description, and a conversation, below ``<destination>/reasoning/``, ``description/`` and ``conversation/``. An image
that the model declines to write about, or an answer that is cut for its length, is a dead letter with the reason, and
everything else is written all the same.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import DAG, Param, conf

from airflow_vlm_provider.operators.image_captioning_gpt4v import ImageCaptioningFromGPT4VOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator

SOURCE = "s3://datasets/images"
DESTINATION = "s3://datasets/instruction-data"
# Where the tasks that ask the model run is configuration. It is named here because the engine is the connection's, which is
# not known when this is parsed. Leave both out for an endpoint that needs no GPU of yours: then any worker will do.
QUEUE = conf.get("vlm", "gpu_queue", fallback="") or conf.get("operators", "default_queue")
POOL = conf.get("vlm", "gpu_pool", fallback="") or "default_pool"
MODES = ("reasoning", "description", "conversation")

with DAG(
    dag_id="instruction_data",
    schedule=None,
    start_date=datetime(2026, 1, 1),
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    params={
        "source": Param(SOURCE, type="string", description="Prefix of the shards"),
        "destination": Param(DESTINATION, type="string", description="Where the instruction data go"),
        "max_tasks": Param(
            50, type="integer", minimum=1, description="Most tasks to spread the shards over, for each kind"
        ),
        "max_error_rate": Param(
            0.1, type="number", minimum=0, maximum=1, description="Share of rows that may fail"
        ),
    },
    tags=["vlm"],
    doc_md=__doc__,
) as dag:
    plan = PlanShardsOperator(
        task_id="plan", source="{{ params.source }}", max_tasks="{{ params.max_tasks }}"
    )

    for mode in MODES:
        ImageCaptioningFromGPT4VOperator.partial(
            task_id=mode,
            source="{{ params.source }}",
            destination="{{ params.destination.rstrip('/') }}/" + mode,
            queue=QUEUE,
            pool=POOL,
            mode=mode,
            max_token=800,
            temperature=0.7,
            detail="high",
            keep_original_sample=False,
            any_or_all="all",
            max_pixels=1024 * 1024,
        ).expand(shards=plan.output)
