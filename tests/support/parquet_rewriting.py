"""What tests of the Parquet writer do to a shard, and what its file says of itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from airflow_vlm_provider.types import Row, Sample
from tests.support.parquet_shards import META, with_field

CAPTION = {"caption": {"type": "string"}}


def tagged(sample: Sample) -> Sequence[Row]:
    """The sample with image tags among its meta data."""
    meta = (sample.row or {}).get(META) or {}
    return [with_field(sample, META, {**meta, "image_tags": [["a", "b"], []]})]


def metadata_of(shard: bytes) -> Any:
    """The metadata in the shard's footer."""
    return pq.read_metadata(io.BytesIO(shard))
