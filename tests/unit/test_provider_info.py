"""What Airflow learns about the package, checked the way Airflow checks it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import airflow
import jsonschema
import pytest
from airflow.providers_manager import ProvidersManager
from airflow.sdk import BaseOperator, task
from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

from airflow_vlm_provider import operators
from airflow_vlm_provider.decorators.vlm import vlm_task
from airflow_vlm_provider.get_provider_info import get_provider_info
from airflow_vlm_provider.hooks.settings import DEFAULT_TIMEOUT, ENGINES, FIELDS, parse_settings
from airflow_vlm_provider.hooks.vlm import VLMHook
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.placement import PlacedOperator
from airflow_vlm_provider.operators.runners import flush_policy

PACKAGE = "airflow-provider-vlm"


@pytest.fixture
def connection_type() -> dict[str, Any]:
    (found,) = get_provider_info()["connection-types"]
    return found


def test_fits_airflows_schema():
    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())

    errors = jsonschema.validators.validator_for(schema)(schema).iter_errors(get_provider_info())
    assert [error.message for error in errors] == []


def test_airflow_finds_the_provider_under_its_packages_name():
    provider = ProvidersManager().providers[PACKAGE]

    assert provider.data["name"] == "Vision-language models"
    assert provider.version == importlib.metadata.version(PACKAGE)


def test_airflow_loads_the_hook_by_its_connection_type():
    info = ProvidersManagerTaskRuntime().hooks["vlm"]

    assert info is not None
    assert info.hook_class_name == f"{VLMHook.__module__}.{VLMHook.__name__}"
    assert info.connection_id_attribute_name == "vlm_conn_id"
    assert info.hook_name == VLMHook.hook_name


def test_every_module_named_is_there():
    info = get_provider_info()

    for kind in ("hooks", "operators"):
        for group in info[kind]:
            for module in group["python-modules"]:
                assert importlib.util.find_spec(module) is not None, module


def lists(value: Any) -> Iterator[list[Any]]:
    """Every list in it, however deep."""
    if isinstance(value, list):
        yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from lists(each)


def test_nothing_is_named_twice():
    found = list(lists(get_provider_info()))

    assert len(found) > 10
    for each in found:
        texts = [json.dumps(entry, sort_keys=True) for entry in each]
        assert len(set(texts)) == len(texts), each


def test_the_form_has_exactly_the_fields_that_the_hook_reads(connection_type):
    assert sorted(connection_type["conn-fields"]) == sorted(FIELDS)
    assert tuple(sorted(connection_type["conn-fields"]["engine"]["schema"]["enum"])) == tuple(sorted(ENGINES))
    assert f"empty for {DEFAULT_TIMEOUT:g}" in connection_type["conn-fields"]["timeout"]["description"]


def test_every_field_has_a_label_and_an_explanation(connection_type):
    for name, field in connection_type["conn-fields"].items():
        assert field["label"][0].isupper(), name
        assert field["description"].endswith("."), name


def test_a_form_saved_empty_or_with_its_least_values_is_accepted_by_the_hook(connection_type):
    empty, least = {}, {}
    for name, field in connection_type["conn-fields"].items():
        assert "null" in field["schema"]["type"], name
        empty[name] = None
        least[name] = field["schema"].get("minimum")

    assert parse_settings("c", extra=json.dumps(empty)) == parse_settings("c", extra=json.dumps({}))
    assert parse_settings("c", extra=json.dumps(least))[0].max_concurrency == 1


def test_the_key_is_called_by_its_name_and_the_login_is_hidden(connection_type):
    behaviour = connection_type["ui-field-behaviour"]

    assert behaviour["relabeling"]["password"] == "API key"
    assert "login" in behaviour["hidden-fields"]


def test_airflow_finds_the_commands():
    commands = {
        command.name: command for each in ProvidersManager().cli_command_functions for command in each()
    }

    groups = {each.name: each.subcommands for each in commands["vlm"].subcommands}
    names = {name: {each.name for each in subcommands} for name, subcommands in groups.items()}
    assert names == {"ledger": {"show", "prune"}, "recipe": {"check"}, "engine": {"list", "stop", "logs"}}
    for name, subcommands in groups.items():
        module = importlib.import_module(f"airflow_vlm_provider.cli.{name}")
        for each in subcommands:
            assert callable(getattr(module, each.func.__name__)), each.name


def test_the_journals_settings_have_the_defaults_of_the_journal():
    options = get_provider_info()["config"]["vlm"]["options"]
    defaults = {name: options[f"journal_flush_{name}"]["default"] for name in asdict(FlushPolicy())}

    assert {name: float(value) for name, value in defaults.items()} == asdict(FlushPolicy())
    assert flush_policy() == FlushPolicy()


def test_every_module_of_operators_can_be_imported_and_has_one():
    (group,) = get_provider_info()["operators"]
    for name in group["python-modules"]:
        defined = [each for each in vars(importlib.import_module(name)).values() if isinstance(each, type)]
        assert any(issubclass(each, BaseOperator) and each.__module__ == name for each in defined), name


def test_every_module_with_an_operator_is_named():
    (group,) = get_provider_info()["operators"]
    for path in sorted((Path(operators.__file__).parent).glob("*.py")):
        name = f"{operators.__name__}.{path.stem}"
        module = importlib.import_module(name)
        public = [
            each
            for each in vars(module).values()
            if isinstance(each, type) and issubclass(each, BaseOperator) and each.__module__ == name
        ]
        named = name in group["python-modules"]
        # The bases of the others are nobody's operators.
        assert named == bool(set(public) - {PlacedOperator, ShardOperator}), name


def test_airflow_finds_the_decorator():
    assert ProvidersManagerTaskRuntime().taskflow_decorators["vlm"] is vlm_task
    assert task.vlm is vlm_task
