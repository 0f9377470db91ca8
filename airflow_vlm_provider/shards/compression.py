"""Compressed shards: gzip and Zstandard as streams whose end is the end of the data, or an error."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from airflow_vlm_provider.errors import ShardError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

INPUT_BYTES = 64 * 1024
# Zstandard can expand 4 bytes to 128 KiB. Taken in small steps, hostile data fills 64 MiB at the most.
STEP_BYTES = 2 * 1024
GZIP_WITH_HEADER = 16 + zlib.MAX_WBITS


class Codec(Protocol):
    """A compression format. Its objects work as those of :mod:`zlib` do."""

    @property
    def name(self) -> str: ...

    def decompressor(self) -> Any:
        """Return an object that decompresses one member or frame."""

    def compressor(self) -> Any:
        """Return an object that compresses to one member or frame, the same bytes for the same data."""

    def damage(self) -> type[Exception]:
        """Return the exception that a decompressor raises for corrupt data."""


class Gzip:
    """gzip, through zlib: unlike the gzip module's, its headers hold no time."""

    name = "gzip"

    def decompressor(self) -> Any:
        return zlib.decompressobj(wbits=GZIP_WITH_HEADER)

    def compressor(self) -> Any:
        return zlib.compressobj(wbits=GZIP_WITH_HEADER)

    def damage(self) -> type[Exception]:
        return zlib.error


class Zstandard:
    """Zstandard; frames are written with a checksum, as its command-line tool does."""

    name = "zstd"

    def decompressor(self) -> Any:
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()

    def compressor(self) -> Any:
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compressobj()

    def damage(self) -> type[Exception]:
        import zstandard

        error: type[Exception] = zstandard.ZstdError
        return error


class DecompressingReader(io.RawIOBase):
    """The decompressed bytes of a stream, of all its gzip members or Zstandard frames.

    The libraries' own readers are not so strict: zstandard's takes a truncated frame for a finished one, and
    both take an empty file for an empty shard, though even nothing compresses to some bytes.

    :param stream: Compressed bytes; it is left open.
    :raises ShardError: (when reading) the data is corrupt or ends early.
    """

    def __init__(self, stream: BinaryIO, codec: Codec) -> None:
        super().__init__()
        self._stream = stream
        self._codec = codec
        self._damage = codec.damage()
        self._member: Any = codec.decompressor()
        self._input = memoryview(b"")
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._output:
            if not self._input:
                self._input = memoryview(self._stream.read(INPUT_BYTES))
                if not self._input:
                    return self._finish()
            self._decompress()
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._output))
        view[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self) -> None:
        if self._member is None:
            self._member = self._codec.decompressor()
        step = self._input[:STEP_BYTES]
        # Even an empty view keeps alive what it is a view of.
        self._output = memoryview(b"")
        try:
            self._output = memoryview(self._member.decompress(step))
        except self._damage as error:
            raise ShardError(
                f"The shard's {self._codec.name} data is corrupt ({error}). Write it again, or take it out."
            ) from error
        used = len(step)
        if self._member.eof:
            used -= len(self._member.unused_data)
            self._member = None
        self._input = self._input[used:]

    def _finish(self) -> int:
        if self._member is not None:
            raise ShardError(
                f"The shard's {self._codec.name} data ends early, cut off. Write it again, or take it out."
            )
        return 0
