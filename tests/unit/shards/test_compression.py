from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.compression import Codec, DecompressingReader, Gzip, Zstandard
from airflow_vlm_provider.shards.formats import RowKeys, shard_format

CODECS: list[Codec] = [Gzip(), Zstandard()]
ROWS = b"".join(b'{"i": %d}\n' % index for index in range(3000))

codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def compress(codec: Codec, data: bytes) -> bytes:
    compressor = codec.compressor()
    return bytes(compressor.compress(data) + compressor.flush())


def decompress(codec: Codec, data: bytes) -> bytes:
    return io.BufferedReader(DecompressingReader(io.BytesIO(data), codec)).read()


@pytest.mark.parametrize(
    ("codec", "theirs", "ours"),
    [
        (Gzip(), lambda data: gzip.compress(data, mtime=1_700_000_000), gzip.decompress),
        # Without a size in its header a frame is as most programs stream it.
        (
            Zstandard(),
            zstandard.ZstdCompressor(write_content_size=False).compress,
            lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
        ),
    ],
    ids=["gzip", "zstd"],
)
def test_other_programs_files_are_read_and_ours_by_them(
    codec: Codec, theirs: Callable[[bytes], bytes], ours: Callable[[bytes], bytes]
) -> None:
    assert decompress(codec, theirs(ROWS)) == ROWS
    assert ours(compress(codec, ROWS)) == ROWS


@codecs
def test_all_members_are_read(codec: Codec) -> None:
    parts = [ROWS[:100], b"", ROWS[100:101], ROWS[101:]]
    assert decompress(codec, b"".join(compress(codec, part) for part in parts)) == ROWS


def test_a_skippable_frame_is_skipped() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    assert decompress(Zstandard(), skippable + compress(Zstandard(), ROWS) + skippable) == ROWS


@codecs
def test_a_file_cut_off_anywhere_raises(codec: Codec) -> None:
    whole = compress(codec, ROWS[:400])
    for size in range(len(whole)):
        with pytest.raises(ShardError, match="cut off"):
            decompress(codec, whole[:size])
        # The same in a second member: only the cut between the two is no cut.
        if size:
            with pytest.raises(ShardError, match="cut off"):
                decompress(codec, whole + whole[:size])


@codecs
def test_a_flipped_bit_raises(codec: Codec) -> None:
    data = bytearray(compress(codec, ROWS))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(ShardError, match=rf"{codec.name} data is corrupt"):
        decompress(codec, bytes(data))


@codecs
def test_what_is_not_compressed_at_all_raises(codec: Codec) -> None:
    with pytest.raises(ShardError, match="corrupt"):
        decompress(codec, ROWS)


@codecs
def test_the_rows_before_the_damage_do_not_pass_for_the_shard(codec: Codec) -> None:
    suffix = {"gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}[codec.name]
    stream = io.BytesIO(compress(codec, ROWS)[:-1])
    read = []
    with shard_format("a" + suffix).open(stream, keys=RowKeys()) as reader, pytest.raises(ShardError):  # noqa: PT012
        for sample in reader:
            read.append(sample.row)
    assert read == [{"i": index} for index in range(len(read))]


@codecs
def test_a_bomb_is_taken_in_small_steps(codec: Codec) -> None:
    bomb = compress(codec, bytes(160 * 2**20))
    tracemalloc.start()
    try:
        reader = io.BufferedReader(DecompressingReader(io.BytesIO(bomb), codec))
        size = 0
        while data := reader.read(2**20):
            size += len(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == 160 * 2**20
    assert peak < 80 * 2**20


@codecs
def test_the_same_rows_make_the_same_bytes(codec: Codec) -> None:
    script = (
        "import sys; from airflow_vlm_provider.shards.compression import Gzip, Zstandard;"
        f"c = {type(codec).__name__}().compressor();"
        "sys.stdout.buffer.write(c.compress(sys.stdin.buffer.read()) + c.flush())"
    )
    other = subprocess.run([sys.executable, "-c", script], input=ROWS, capture_output=True, check=True).stdout
    assert compress(codec, ROWS) == other


def test_gzip_headers_hold_no_time() -> None:
    assert compress(Gzip(), ROWS)[4:8] == bytes(4)


def test_an_error_of_the_stream_itself_is_not_called_damage() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise ConnectionResetError("the line broke")

    with pytest.raises(ConnectionResetError):
        DecompressingReader(Broken(), Gzip()).read(1)


def test_zstandard_is_imported_only_when_used() -> None:
    script = "import sys, airflow_vlm_provider.shards.formats; sys.exit('zstandard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
