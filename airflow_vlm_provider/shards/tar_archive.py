"""A tar archive as a stream whose end is the end of the archive, or an error.

Left to itself, :mod:`tarfile` takes a damaged header for the end of the archive, and an archive that stops between
two members, without the blocks that mark its end, for a whole one. Both would be a shard with fewer samples.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, cast

from airflow_vlm_provider.errors import ShardError

# Long names and extended headers are read into memory, whatever size the archive claims for them.
MAX_HEADER_BYTES = 1024 * 1024
DRAIN_BYTES = 64 * 1024
# Names that are not UTF-8 come out of an archive as they went in.
ENCODING = "utf-8"
ENCODING_ERRORS = "surrogateescape"

_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_REMEDY = "Write the shard again, or take it out."


class _StrictTarInfo(tarfile.TarInfo):
    """A member's header, which is whole or an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _HEADER_TYPES and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise ShardError(f"The tar archive has an extended header of {header.size} bytes. {_REMEDY}")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile)
        except _END_OF_ARCHIVE:
            raise
        except (_HEADER_ERROR, ValueError, OverflowError) as error:
            raise ShardError(
                f"The tar archive ends early or is damaged before byte {tarfile.offset + 512}: {error}. {_REMEDY}"
            ) from error


_HEADER_ERROR = tarfile.HeaderError
_END_OF_ARCHIVE: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]


class TarArchive:
    """The members of an uncompressed tar archive, in order, once; nothing is held or unpacked.

    Links, directories and the like are members too. Refused are archives whose members could be meant to be unpacked
    outside of a folder, because shards are copied and handed on; sparse members; and several archives one after the
    other, of which other readers would only see the first.

    :param stream: The archive's bytes, read to their end; it is left open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> TarArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """
        Yield each member's header.

        :raises ShardError: The archive is cut off, damaged or refused.
        """
        try:
            self._tar = tarfile.open(  # noqa: SIM115  closed by __exit__
                fileobj=self._stream,
                mode="r|",
                tarinfo=_StrictTarInfo,
                encoding=ENCODING,
                errors=ENCODING_ERRORS,
            )
            for member in self._tar:
                # It would remember all of them.
                self._tar.members.clear()  # type: ignore[attr-defined]
                _check(member)
                yield member
        except tarfile.TarError as error:
            raise ShardError(f"The tar archive ends early or is damaged: {error}. {_REMEDY}") from error
        self._drain(self._tar)

    def read(self, member: tarfile.TarInfo) -> bytes:
        """
        Return the content of the member that was yielded last.

        :raises ShardError: The archive is cut off in the middle of it.
        """
        assert self._tar is not None
        content = self._tar.extractfile(member)
        assert content is not None
        try:
            return content.read(member.size)
        except tarfile.TarError as error:
            raise ShardError(f"The tar archive ends early, within {member.name!r}. {_REMEDY}") from error

    def _drain(self, tar: tarfile.TarFile) -> None:
        """Read what follows the end of the archive: a compressed stream has its checksum there."""
        rest = cast("BinaryIO", tar.fileobj)
        while chunk := rest.read(DRAIN_BYTES):
            if chunk.count(0) < len(chunk):
                raise ShardError(
                    "The tar archive goes on after its end. If it is several archives one after the other, unpack "
                    "all of them (tar --ignore-zeros) and write them as one."
                )


def has_content(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file, or of a kind that is not known and treated like one, as POSIX demands."""
    return member.isreg() or member.type not in tarfile.SUPPORTED_TYPES


def _check(member: tarfile.TarInfo) -> None:
    if member.size < 0:
        raise ShardError(f"The tar archive is damaged: {member.name!r} has {member.size} bytes. {_REMEDY}")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ShardError(
            f"The tar archive's member {member.name!r} leads out of the folder that it would be unpacked in. Write "
            "the shard again with names below one folder."
        )
    if member.issparse():
        raise ShardError(
            f"The tar archive's member {member.name!r} is sparse. Write it again without tar's --sparse."
        )
