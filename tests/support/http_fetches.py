"""Fetching media over HTTP with little patience, and what a fetch that fails raises."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.http_media import HttpFetcher
from airflow_vlm_provider.shards.http_urls import parse_url
from airflow_vlm_provider.shards.media_roots import MediaRoots
from tests.support.images import encode, photo

JPEG = encode(photo(), "JPEG")
MAX_BYTES = 1024 * 1024


def fetch(url: str, *roots: str, **limits: Any) -> bytes:
    """Fetch with patience for a fraction of a second."""
    allowed = MediaRoots(roots)
    limits = {
        "max_bytes": MAX_BYTES,
        "read_timeout": 1.0,
        "connect_timeout": 1.0,
        "total_timeout": 2.0,
        "first_wait": 0.001,
        **limits,
    }
    return HttpFetcher(reach=allowed.reach, **limits).fetch(parse_url(url))


def failure(url: str, *roots: str, **limits: Any) -> SampleError:
    """What :func:`fetch` raises of a file that it does not get."""
    with pytest.raises(SampleError) as caught:
        fetch(url, *roots, **limits)
    return caught.value
