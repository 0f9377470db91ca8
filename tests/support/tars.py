"""Tars for tests of WebDataset shards, and what a reader and writer make of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from airflow_vlm_provider.shards.formats import RowKeys, shard_format
from airflow_vlm_provider.shards.webdataset import WebDataset
from airflow_vlm_provider.types import Row, Sample

KEYS = RowKeys()
PLAIN = WebDataset(suffixes=(".tar",))


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of files, and of members without content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, encoding="utf-8") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Return a member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def contents(data: bytes) -> list[tuple[str, bytes]]:
    """Return the names and bytes in a tar, as :mod:`tarfile` reads them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [
            (info.name, file.read() if (file := archive.extractfile(info)) is not None else b"")
            for info in archive
        ]


def read(data: bytes, form: WebDataset = PLAIN) -> list[Sample]:
    with form.open(io.BytesIO(data), keys=KEYS) as reader:
        return list(reader)


def rewrite(
    data: bytes,
    step: Callable[[Sample], Sequence[Row] | None],
    *,
    name: str = "a.tar",
    generated: Mapping[str, Any] | Iterable[str] = (),
) -> bytes:
    """Take a shard through a step that returns rows, or None for a sample that stays as it is."""
    output = io.BytesIO()
    with (
        shard_format(name).open(io.BytesIO(data), keys=KEYS) as reader,
        reader.writer(output, generated={field: {} for field in generated}) as writer,
    ):
        for sample in reader:
            rows = None if sample.row is None else step(sample)
            if rows is None:
                writer.write_unchanged(sample)
            else:
                writer.write(sample, rows)
    return output.getvalue()
