"""Data-Juicer's names for the model, each of which is another name for ``api_or_hf_model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow_vlm_provider.operators.parameters import ParameterError, is_known


def model_alias(alias: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What an alias means by the name that all operators know; nothing where it is not given.

    :param alias: The other name.
    :param given: An operator's arguments.
    :raises ParameterError: it is no string, or the model is given twice.
    """
    model = given.get(alias)
    if model is None:
        return {}
    if not isinstance(model, str) and is_known(model):
        raise ParameterError(f"{alias}={model!r} must be a string, or None.")
    if given.get("api_or_hf_model") is not None:
        raise ParameterError(
            f"{alias}={model!r} and api_or_hf_model={given['api_or_hf_model']!r} both name the model; keep one."
        )
    return {"api_or_hf_model": model}
