"""WebDataset: a tar whose members that share a name up to its first dot are one sample.

A sample of ``train/0001.jpg``, ``train/0001.json`` and ``train/0001.txt`` has the key ``train/0001`` and this row:

=====================  =========================================================================================
field                  value
=====================  =========================================================================================
those of the JSON      from the ``.json``, which has to hold an object
``__key__``            the key
the text's             the content of the ``.txt``, which has to be UTF-8
the images'            base names of the images (``.jpg``, also ``.front.jpg``), in order; :data:`IMAGES`
the videos'            base names of the videos, in order; :data:`VIDEOS`
=====================  =========================================================================================

Only what the sample has members for stands over what its ``.json`` says. All other members (``.cls``, ``.npy``, ...)
are carried along. As for the webdataset library, members of one sample follow one another, so that a key that comes
again later is another sample; suffixes are compared in lower case; and members without a dot or with nothing before
it, directories, links and ``__name__`` are no part of any sample. They are kept where they are.

A sample is malformed, and no reason to stop, when its ``.json`` or ``.txt`` cannot be read as such, two of its
members have the same suffix, one that is asked about is only a link, a name is not UTF-8, or it is too large to be
held. A tar that is cut
off or damaged is an error, see :mod:`airflow_vlm_provider.shards.tar_archive`.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.compression import Codec, DecompressingReader
from airflow_vlm_provider.shards.jsonl import parse_object
from airflow_vlm_provider.shards.tar_archive import TarArchive, has_content
from airflow_vlm_provider.types import Row, Sample

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.formats import RowKeys
    from airflow_vlm_provider.shards.webdataset_writer import WebDatasetWriter

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
VIDEOS = frozenset({"mp4", "webm", "mkv", "mov", "avi", "m4v"})
MEDIA = IMAGES | VIDEOS
MAX_MEMBER_BYTES = 64 * 1024 * 1024
MAX_SAMPLE_BYTES = 256 * 1024 * 1024
MAX_MEMBERS = 10_000
# What a member's header takes in memory, roughly.
HEADER_BYTES = 1024
KEY_FIELD = "__key__"


@dataclass(frozen=True)
class WebDataset:
    """WebDataset tars, plain or compressed.

    :param suffixes: Endings of the names of such shards.
    :param codec: The compression; None for none.
    :param max_member_bytes: A longer member is passed over without being held in memory, and its sample is
        malformed; so the shard cannot be written again in full.
    :param max_sample_bytes: The same for all members of a sample together.
    """

    suffixes: tuple[str, ...]
    codec: Codec | None = None
    max_member_bytes: int = MAX_MEMBER_BYTES
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    seekable = False
    always_embeds = True

    @contextlib.contextmanager
    def open(self, stream: BinaryIO, *, keys: RowKeys) -> Iterator[WebDatasetReader]:
        yield WebDatasetReader(stream, self, keys)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the tar.

    :param suffix: What follows the first dot of its base name, in lower case; None when it is no part of a sample.
    :param data: Its content; None when it is too large to be held.
    """

    info: tarfile.TarInfo
    suffix: str | None
    data: bytes | None


@dataclass(frozen=True, slots=True)
class TarSample:
    """What a sample is written back from: its ``origin``.

    :param members: All members from the sample's first to the next one's.
    :param fields: What the ``.json`` holds.
    :param own: The fields of the row that other members stand for.
    :param next_key: The key of the sample that follows.
    """

    members: tuple[Member, ...]
    fields: Row
    own: Row
    next_key: str | None


class WebDatasetReader:
    """An open WebDataset tar."""

    embeds_media = True
    sidecar_of = None

    def __init__(self, stream: BinaryIO, form: WebDataset, keys: RowKeys) -> None:
        self._stream = stream
        self._form = form
        self._keys = keys
        self.loose: tuple[Member, ...] = ()
        """After the last sample: the members of a tar that has no samples."""

    def __iter__(self) -> Iterator[Sample]:
        stream = self._stream
        if self._form.codec is not None:
            stream = cast("BinaryIO", DecompressingReader(stream, self._form.codec))
        index = 0
        with TarArchive(stream) as archive:
            group = _Group(self._form)
            for info in archive:
                key, suffix = _split(info)
                if key is not None and key != group.key:
                    if group.key is not None:
                        yield group.sample(index, self._keys, next_key=key)
                        index += 1
                        group = _Group(self._form)
                    group.key = key
                group.add(info, suffix, archive)
            if group.key is None:
                self.loose = tuple(group.members)
            else:
                yield group.sample(index, self._keys, next_key=None)

    def writer(self, stream: BinaryIO, *, generated: Mapping[str, Any]) -> WebDatasetWriter:
        from airflow_vlm_provider.shards.webdataset_writer import WebDatasetWriter

        return WebDatasetWriter(
            stream, self._form.codec, keys=self._keys, generated=generated, rest=lambda: self.loose
        )


@dataclass
class _Group:
    """The members of one sample, as they come; ahead of the first sample, those that are part of none."""

    form: WebDataset
    key: str | None = None
    members: list[Member] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    held: int = 0
    fault: str | None = None

    def add(self, info: tarfile.TarInfo, suffix: str | None, archive: TarArchive) -> None:
        data: bytes | None = b""
        if suffix is not None and not _is_unicode(info.name):
            self._blame(info, "has a name that is not valid UTF-8")
        if has_content(info):
            data = self._read(info, archive, part=suffix is not None)
        elif suffix is not None:
            self._blame(info, "is a link and not the file itself; write the tar with --hard-dereference")
        if suffix is not None:
            if suffix in self.suffixes:
                self._blame(info, "has the same suffix as another member of its sample")
            self.suffixes.add(suffix)
        self.members.append(Member(info, suffix, data))
        if len(self.members) > MAX_MEMBERS:
            what = "are part of no sample" if self.key is None else f"make one sample, {self.key!r}"
            raise ShardError(
                f"More than {MAX_MEMBERS} members of the tar archive {what}. Samples are told by the members' names "
                "up to the first dot: write the tar with names like 0001.jpg, 0001.json, 0002.jpg."
            )

    def _read(self, info: tarfile.TarInfo, archive: TarArchive, *, part: bool) -> bytes | None:
        if info.size > self.form.max_member_bytes:
            fault = f"is larger than {self.form.max_member_bytes} bytes"
        elif self.held + info.size > self.form.max_sample_bytes:
            fault = f"makes its sample larger than {self.form.max_sample_bytes} bytes"
        else:
            self.held += info.size
            return archive.read(info)
        if part:
            self._blame(info, fault)
        return None

    def _blame(self, info: tarfile.TarInfo, fault: str) -> None:
        if self.fault is None:
            self.fault = f"the member {info.name!r} {fault}"

    def sample(self, index: int, keys: RowKeys, *, next_key: str | None) -> Sample:
        fields, own = self._parse(keys)
        return Sample(
            index=index,
            line=index + 1,
            row=None if self.fault else {**fields, **own},
            error=self.fault,
            key=self.key,
            embedded={
                _reference(member): member.data
                for member in self.members
                if member.suffix is not None
                and member.data is not None
                and _last_part(member.suffix) in MEDIA
            },
            origin=TarSample(tuple(self.members), fields, own, next_key),
            memory=self.held + HEADER_BYTES * len(self.members),
        )

    def _parse(self, keys: RowKeys) -> tuple[Row, Row]:
        """Return the fields that the ``.json`` holds, and those that the other members stand for."""
        fields: Row = {}
        own: Row = {KEY_FIELD: self.key}
        for member in self.members:
            if member.suffix is None or member.data is None:
                continue
            if member.suffix == "json":
                parsed, fault = parse_object(member.data)
                fields = parsed or {}
                if fault is not None:
                    self._blame(member.info, fault)
            elif member.suffix == "txt":
                try:
                    own[keys.text] = member.data.decode()
                except UnicodeDecodeError as error:
                    self._blame(member.info, f"is not valid UTF-8 at byte {error.start + 1}")
            elif (kind := _last_part(member.suffix)) in IMAGES:
                own.setdefault(keys.image, []).append(_reference(member))
            elif kind in VIDEOS:
                own.setdefault(keys.video, []).append(_reference(member))
        return fields, own


def _split(info: tarfile.TarInfo) -> tuple[str | None, str | None]:
    """Return the key of a member's sample and the suffix in lower case; None and None if it is part of no sample."""
    top = info.name.partition("/")[0]
    folder, slash, name = info.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    suffix = suffix.lower()
    if not stem or not dot or (len(top) > 4 and top.startswith("__") and top.endswith("__")):
        return None, None
    if not has_content(info):
        # Whoever links instead of copying means the content; a link to anything else says nothing.
        is_link = info.islnk() or info.issym()
        if not is_link or (suffix not in ("json", "txt") and _last_part(suffix) not in MEDIA):
            return None, None
    return folder + slash + stem, suffix


def _reference(member: Member) -> str:
    """What stands for a member in its sample's row: unique there, and never used as a path."""
    return member.info.name.rpartition("/")[2]


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last_part(suffix: str) -> str:
    return suffix.rpartition(".")[2]
