"""Writing a WebDataset tar again, with what a step added.

Members keep their order, headers and bytes. What a step changed or added stands in the sample's ``.json``, which is
made when there was none; the ``.txt``, if there is one, takes a changed text. The key and the names of media are the
archive's own and no fields of the ``.json``: a step can't change them.

A sample's second row and those after it get keys of their own, ``<key>_1`` and so on, and members of their own.
Only neighbours are compared, because only those would be read as one sample.
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.compression import Codec
from airflow_vlm_provider.shards.jsonl import encode_object
from airflow_vlm_provider.shards.tar_archive import ENCODING, ENCODING_ERRORS, has_content
from airflow_vlm_provider.shards.webdataset import Member, TarSample
from airflow_vlm_provider.types import Row, Sample

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.formats import RowKeys

END_BYTES = 2 * tarfile.BLOCKSIZE


class WebDatasetWriter:
    """Writes samples that a :class:`~airflow_vlm_provider.shards.webdataset.WebDatasetReader` read.

    :param stream: Takes the bytes; it is left open.
    :param generated: The fields that a step adds.
    :param rest: Returns, at the end, members that belong to no sample.
    """

    def __init__(
        self,
        stream: BinaryIO,
        codec: Codec | None,
        *,
        keys: RowKeys,
        generated: Mapping[str, Any],
        rest: Callable[[], Sequence[Member]],
    ) -> None:
        self._keys = keys
        self._generated = generated
        self._rest = rest
        self._stream = stream
        self._compressor: Any = None if codec is None else codec.compressor()
        self._written = 0
        self._last_key: str | None = None

    def __enter__(self) -> WebDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for member in self._rest():
                self._add(member.info, member.data)
            self._write(tarfile.NUL * END_BYTES)
            self._write(tarfile.NUL * (-self._written % tarfile.RECORDSIZE))
            if self._compressor is not None:
                self._stream.write(self._compressor.flush())

    def write(self, sample: Sample, rows: Sequence[Row]) -> None:
        """
        Write a sample once for every row.

        :raises TypeError, ValueError: A value has no JSON, or a row changes what the archive itself says.
        :raises ShardError: A member is too large to have been held.
        """
        origin: TarSample = sample.origin
        if not rows:
            for member in origin.members:
                if member.suffix is None:
                    self._add(member.info, member.data)
        # All of them first: a row that can't be written leaves nothing of its sample behind.
        for number, replaced in enumerate([self._replaced(sample, row) for row in rows]):
            self._put(sample, number, replaced)

    def write_unchanged(self, sample: Sample) -> None:
        """
        Write a sample's members as they were.

        :raises ShardError: One is too large to have been held.
        """
        self._put(sample, 0, {})

    def _put(self, sample: Sample, number: int, replaced: Mapping[str, bytes]) -> None:
        """Write a sample's members, some with other content, and the ``.json`` at the end if it is new."""
        origin: TarSample = sample.origin
        assert sample.key is not None
        key = self._free_key(sample.key, number, origin.next_key)
        self._last_key = key
        own = [member for member in origin.members if member.suffix is not None]
        is_new = "json" in replaced and all(member.suffix != "json" for member in own)
        for member in origin.members:
            if member.suffix is None:
                if number == 0:
                    self._add(member.info, member.data)
                continue
            name = key + member.info.name[len(sample.key) :]
            self._add(member.info, replaced.get(member.suffix, member.data), name=name)
            if is_new and member is own[-1]:
                self._add(_sibling(member.info), replaced["json"], name=f"{key}.json")

    def _free_key(self, key: str, number: int, next_key: str | None) -> str:
        # The key itself is taken when the samples between two of the same key were dropped.
        if number == 0 and key != self._last_key:
            return key
        number = max(number, 1)
        while (free := f"{key}_{number}") in (self._last_key, next_key):
            number += 1
        return free

    def _replaced(self, sample: Sample, row: Row) -> dict[str, bytes]:
        """Return the content of the members that a row changes, by suffix."""
        assert sample.row is not None
        origin: TarSample = sample.origin
        text, fields, own = self._keys.text, origin.fields, origin.own
        for name in own:
            if name != text and (name not in row or row[name] != own[name]):
                raise ValueError(
                    f"The field {name!r} says what the members of the tar are and can't be changed in it. Write a "
                    "sidecar instead of the full shard, or let the step write to another field."
                )
        replaced: dict[str, bytes] = {}
        changed = {
            name: fields[name] if name in own else row[name] for name in fields if name in own or name in row
        }
        changed |= {name: row[name] for name in row if name not in own and name not in fields}
        if text in own and row.get(text) != own[text]:
            if not isinstance(row.get(text), str):
                raise TypeError(f"The field {text!r} stands in a .txt, so it has to be a string.")
            replaced["txt"] = row[text].encode()
            if text in fields or text in self._generated:
                changed[text] = row[text]
        if changed.keys() != fields.keys() or any(changed[name] is not fields[name] for name in fields):
            replaced["json"] = encode_object(changed)
        return replaced

    def _add(self, info: tarfile.TarInfo, data: bytes | None, *, name: str | None = None) -> None:
        if data is None:
            raise ShardError(
                f"The tar archive's member {info.name!r} has {info.size} bytes, which is too large to be copied. Write "
                "a sidecar instead of the full shard, or take the sample out."
            )
        if not has_content(info):
            data = b""
        elif info.size != len(data):
            info = _changed(info, "size", "size", len(data))
        if name is not None and info.name != name:
            info = _changed(info, "name", "path", name)
        self._write(info.tobuf(tarfile.PAX_FORMAT, ENCODING, ENCODING_ERRORS))
        self._write(data)
        self._write(tarfile.NUL * (-len(data) % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._stream.write(data if self._compressor is None else self._compressor.compress(data))
        self._written += len(data)


def _changed(info: tarfile.TarInfo, attribute: str, record: str, value: object) -> tarfile.TarInfo:
    """Return a header with another value, which an extended header's record would otherwise override."""
    changed = copy.copy(info)
    setattr(changed, attribute, value)
    changed.pax_headers = {name: each for name, each in info.pax_headers.items() if name != record}
    return changed


def _sibling(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return the header of a new file beside another: the same times, rights and owner."""
    sibling = tarfile.TarInfo()
    for attribute in ("mode", "mtime", "uid", "gid", "uname", "gname"):
        setattr(sibling, attribute, getattr(info, attribute))
    return sibling
