from __future__ import annotations

from textwrap import dedent

import pytest

from airflow_vlm_provider.recipes.reading import read_recipe
from airflow_vlm_provider.recipes.recipe import Recipe
from tests.support.recipes import TAGGING


@pytest.fixture
def read(tmp_path):
    """Read a recipe of this text; with ``process`` added where it is left out."""

    def read(text: str) -> Recipe:
        text = dedent(text)
        path = tmp_path / "recipe.yaml"
        path.write_text(text if "process" in text else f"{text}\n{TAGGING}")
        return read_recipe(path)

    return read
