"""What a recipe may say and what operators can do are told in two places: here they are held together."""

from __future__ import annotations

import inspect
from itertools import chain

import pytest

from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.recipes import operator_class
from airflow_vlm_provider.recipes.operators import FIELDS, SUPPORTED
from airflow_vlm_provider.recipes.recipe import RecipeStep
from airflow_vlm_provider.recipes.settings import SHARED


def own_arguments(operator: type) -> set[str]:
    parameters = inspect.signature(vars(operator)["__init__"]).parameters.values()
    return {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_operators_take_what_recipes_may_give(name):
    supported = SUPPORTED[name]
    operator = operator_class(RecipeStep(0, name, supported.step, {}))
    assert issubclass(operator, ShardOperator)
    all_arguments = own_arguments(operator) | own_arguments(ShardOperator)
    assert set(supported.known) <= all_arguments
    assert set(chain(FIELDS, SHARED.values())) <= own_arguments(ShardOperator)
    # And nothing that is an operator's own is kept from recipes.
    assert own_arguments(operator) <= set(supported.known)
    assert set(supported.yielding) <= set(supported.known)
    assert set(supported.yielding.values()) <= own_arguments(ShardOperator)


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_a_step_is_called_what_its_ledger_calls_it(name):
    supported = SUPPORTED[name]
    operator = operator_class(RecipeStep(0, name, supported.step, {}))
    made = operator(task_id="made", source="/in", destination="/out")
    assert made.make_step().name == supported.step
