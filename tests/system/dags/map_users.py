"""The general step as its users write it: a function, and a model that answers have to fit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param, task
from pydantic import BaseModel

from airflow_vlm_provider.operators.shards import PlanShardsOperator


class Seen(BaseModel):
    caption: str
    tags: list[str]


PLACES = {"source": Param("", type="string"), "destination": Param("", type="string")}

with DAG("task_vlm", schedule=None, params={**PLACES, "style": "plain"}):
    plan = PlanShardsOperator(task_id="plan", source="{{ params.source }}", max_tasks=3)

    @task
    def choose(params: dict[str, Any]) -> str:
        return f"in {params['style']} words"

    @task.vlm(
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        vlm_conn_id="vlm_stub",
        field="seen",
        output_type=Seen,
        max_error_rate=0.5,
        retries=5,
        retry_delay=timedelta(seconds=1),
    )
    def describe(sample: dict[str, Any], how: str, params: dict[str, Any]) -> str | None:
        if sample["id"] == 2:
            raise ValueError("there is no row 2 in my book")
        if sample["id"] == 3:
            return None
        return f"Describe {sample['text']!r} {how}, {params['style']}."

    describe.partial(how=choose()).expand(shards=plan.output)
