"""A DAG as its author would write it: public names only."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, Param

from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator

with DAG(
    "users_own",
    schedule=None,
    params={"source": Param("", type="string"), "destination": Param("", type="string")},
):
    plan = PlanShardsOperator(task_id="plan", source="{{ params.source }}", max_tasks=3)
    ImageTaggingVLMOperator.partial(
        task_id="tag",
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        vlm_conn_id="vlm_stub",
        retries=3,
        retry_delay=timedelta(seconds=1),
        outlets=[Asset(name="users_tags", uri="s3://users/tags")],
    ).expand(shards=plan.output)

with DAG(
    "one_task",
    schedule=None,
    params={"source": Param("", type="string"), "destination": Param("", type="string")},
):
    ImageTaggingVLMOperator(
        task_id="tag",
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        vlm_conn_id="vlm_stub",
        concurrency=4,
        retries=3,
        retry_delay=timedelta(seconds=1),
    )

with DAG("wrong_key", schedule=None, params={"source": Param("", type="string")}):
    ImageTaggingVLMOperator(
        task_id="tag",
        source="{{ params.source }}",
        destination="s3://users/never",
        vlm_conn_id="vlm_wrong_key",
        retries=3,
    )
