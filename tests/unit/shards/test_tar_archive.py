from __future__ import annotations

import io
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.tar_archive import MAX_HEADER_BYTES, TarArchive, has_content
from tests.support.tars import special, tar

BLOCK = tarfile.BLOCKSIZE


def members(data: bytes) -> list[tuple[str, bytes]]:
    with TarArchive(io.BytesIO(data)) as archive:
        return [(info.name, archive.read(info) if has_content(info) else b"") for info in archive]


def passed_over(data: bytes) -> list[str]:
    with TarArchive(io.BytesIO(data)) as archive:
        return [info.name for info in archive]


# A long name needs an extended header, and with it a place more where an archive can be cut off.
FILES = [("a.jpg", b"x" * 700), ("b" * 150 + ".jpg", b"y" * BLOCK), ("é.txt", b""), ("d.json", b"{}")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("reads", [members, passed_over])
def test_an_archive_cut_off_anywhere_is_an_error(form, reads):
    whole = tar(*FILES, form=form)
    expected = reads(whole)
    end = len(whole.rstrip(b"\0"))
    end += -end % BLOCK
    cuts = {*range(0, end + 1, BLOCK), *random.Random(1).sample(range(end), 100), end + 1, end + BLOCK - 1}
    for cut in sorted(cuts):
        with pytest.raises(ShardError, match="ends early"):
            reads(whole[:cut])
    # From the first block of the end on, nothing is missing.
    for cut in (end + BLOCK, end + BLOCK + 1, end + 2 * BLOCK, len(whole)):
        assert reads(whole[:cut]) == expected


def test_an_archive_without_members_is_empty():
    assert members(tar()) == []
    assert members(b"\0" * BLOCK) == []
    with pytest.raises(ShardError, match="ends early"):
        members(b"")


def test_what_is_no_tar_is_an_error():
    for data in (b"{}\n" * 400, b"\x1f\x8b" + b"x" * 2000, b"\0" * 511 + b"x"):
        with pytest.raises(ShardError):
            members(data)


def test_damage_in_the_middle_is_not_the_end():
    whole = bytearray(tar(*FILES))
    header = bytes(whole).index(b"d.json")
    whole[header] ^= 1
    with pytest.raises(ShardError, match="damaged before byte"):
        members(bytes(whole))


def test_a_header_that_claims_another_size_is_an_error():
    info = tarfile.TarInfo("a.jpg")
    info.size = 8 * 1024**3 - 1
    with pytest.raises(ShardError, match="ends early"):
        members(info.tobuf() + b"x" * 5000)
    info.size = -5
    with pytest.raises(ShardError, match="has -5 bytes"):
        members(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 5000)


def test_an_endless_header_is_not_read():
    info = special("h", tarfile.XHDTYPE)
    info.size = MAX_HEADER_BYTES + 1
    with pytest.raises(ShardError, match=f"extended header of {MAX_HEADER_BYTES + 1} bytes"):
        members(info.tobuf() + b"\0" * 5000)


def test_a_second_archive_behind_the_end_is_an_error():
    one, two = tar(("a.jpg", b"1")), tar(("b.jpg", b"2"))
    with pytest.raises(ShardError, match="goes on after its end"):
        members(one + two)
    assert members(one + b"\0" * 100_000) == [("a.jpg", b"1")]


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", ".."])
def test_names_that_lead_out_are_refused(name):
    with pytest.raises(ShardError, match="leads out"):
        members(tar((name, b"")))


def test_names_that_only_look_like_leading_out_are_not():
    names = ["./a.jpg", "a..b/c.jpg", "...jpg", "a/..b"]
    assert passed_over(tar(*((name, b"") for name in names))) == names


def test_sparse_members_are_refused():
    info = special("a.jpg", tarfile.GNUTYPE_SPARSE)
    with pytest.raises(ShardError, match="sparse"):
        members(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)


def test_other_kinds_of_members_have_no_content():
    kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    data = tar(*(special(f"{number}", kind, "x") for number, kind in enumerate(kinds)), ("z", b"1"))
    assert members(data) == [*((str(number), b"") for number in range(len(kinds))), ("z", b"1")]


@settings(deadline=None)  # A busy machine is no failure.
@given(place=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_damaged_byte_never_ends_in_anything_but_an_error_or_all_members(place, value):
    whole = bytearray(tar(*FILES[:2], FILES[3]))
    place %= len(whole.rstrip(b"\0"))
    whole[place] = value
    try:
        found = passed_over(bytes(whole))
    except ShardError:
        return
    assert len(found) == 3


def test_members_are_not_remembered(tmp_path):
    import tracemalloc

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.tar"
        path.write_bytes(tar(*((f"{number:05}.jpg", b"") for number in range(count))))
        with path.open("rb") as stream, TarArchive(stream) as archive:
            tracemalloc.start()
            assert sum(1 for _ in archive) == count
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most

    assert peak(3000) < 2 * peak(300)
