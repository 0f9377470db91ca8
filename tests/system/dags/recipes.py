"""A DAG that is made of a recipe."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_vlm_provider.operators.recipes import recipe_task_group

with DAG(
    "recipe",
    schedule=None,
    params={"source": Param("", type="string"), "destination": Param("", type="string")},
):
    recipe_task_group(
        "tag_and_caption.yaml",
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        max_tasks=3,
        vlm_conn_id="vlm_stub",
        retries=1,
        retry_delay=timedelta(seconds=1),
    )
