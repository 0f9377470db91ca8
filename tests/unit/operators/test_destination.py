"""Where outputs may go."""

from __future__ import annotations

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.destination import check_destination


def is_refused(source: str, destination: str) -> bool:
    try:
        check_destination(source, destination)
    except ConfigError as error:
        return "destination" in str(error)
    return False


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("s3://b/in/", "s3://b/in"),
        ("s3://b/in", "s3://b/in/deeper"),
        ("s3://b", "s3://b/out/"),
        ("file:///data/in", "/data/in/"),
        ("/data/in", "file:///data/in/out"),
        ("/data/x/../in", "/data/in"),
        ("gs://bucket/in/", "gs://bucket/in"),
        ("gs://bucket/in", "gs://bucket/in/deeper"),
        ("gs://bucket/in", "gs://mine@bucket/in/"),
        ("gs://mine@bucket", "gs://mine@bucket/out"),
        ("GS://bucket/in", "gs://bucket/in"),
    ],
)
def test_a_destination_at_or_inside_the_source_is_refused(source: str, destination: str) -> None:
    assert is_refused(source, destination)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("s3://b/in/", "s3://b/input/"),
        ("s3://b/in/", "s3://c/in/"),
        ("s3://b/in/part.jsonl", "s3://b/in/tagged/"),
        ("/data/in", "s3://data/in"),
        ("s3://b/in/", "s3://b/"),
        ("gs://bucket/in", "gs://bucket/input"),
        ("gs://bucket/in", "s3://bucket/in"),
        ("gs://bucket/in", "abfs://bucket/in"),
        # Two storage accounts may each have a container of this name.
        ("abfs://mine@images/in", "abfs://yours@images/in"),
    ],
)
def test_a_destination_elsewhere_is_not_refused(source: str, destination: str) -> None:
    assert not is_refused(source, destination)
