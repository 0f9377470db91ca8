"""The API server hides a connection's headers, and puts them back when a form is saved."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest
from airflow._shared import secrets_masker
from airflow._shared.plugins_manager import is_valid_plugin

from airflow_vlm_provider.plugins.masking import MaskHeadersPlugin

STORED = {"model": "m", "headers": {"X-Gateway": "sk-in-a-header", "Cookie": "session=1234"}}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the API server's masker hides, before the plugin is loaded."""
    fresh = list(secrets_masker.DEFAULT_SENSITIVE_FIELDS)
    monkeypatch.setattr(secrets_masker._secrets_masker(), "sensitive_variables_fields", fresh)
    return fresh


def test_airflow_finds_the_plugin():
    (found,) = importlib.metadata.entry_points(group="airflow.plugins", name=MaskHeadersPlugin.name)

    assert found.load() is MaskHeadersPlugin
    assert is_valid_plugin(MaskHeadersPlugin)


def test_headers_are_hidden_whatever_their_names(names):
    assert secrets_masker.redact(STORED) == STORED, "the test would prove nothing"

    MaskHeadersPlugin.on_load()

    assert secrets_masker.redact(STORED) == {"model": "m", "headers": {"X-Gateway": "***", "Cookie": "***"}}


def test_saving_what_was_hidden_keeps_what_was_stored(names):
    MaskHeadersPlugin.on_load()

    assert secrets_masker.merge(secrets_masker.redact(STORED), STORED) == STORED


def test_loading_it_again_changes_nothing(names):
    MaskHeadersPlugin.on_load()
    once = list(names)
    MaskHeadersPlugin.on_load()

    assert names == once


def test_an_airflow_that_works_otherwise_is_told_the_remedy(monkeypatch, caplog):
    monkeypatch.delattr(secrets_masker._secrets_masker(), "sensitive_variables_fields")

    with caplog.at_level(logging.WARNING):
        MaskHeadersPlugin.on_load()

    assert "[core] sensitive_var_conn_names" in caplog.text
