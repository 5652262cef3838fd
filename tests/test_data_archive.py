"""Archives are unpacked inside their target or refused with the reason; nothing is ever written elsewhere."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from data_samples import tar_of, zip_of

from vlm_dft.config import ValidationLimits
from vlm_dft.data.archive import archive_kind, unpack
from vlm_dft.data.problems import FileError

FILES = {"data.jsonl": b"{}\n", "images/a.png": b"not a picture", "deep/er/b": b"b"}
LIMITS = ValidationLimits()


def unpacked(tmp_path: Path, data: bytes, limits: ValidationLimits = LIMITS) -> dict[str, bytes]:
    """Files below the target, after checking that nothing appeared beside it."""
    packed, target = tmp_path / "packed", tmp_path / "around" / "target"
    packed.write_bytes(data)
    target.mkdir(parents=True)
    try:
        unpack(packed, "up.tar.gz", target, limits)
    finally:
        assert [entry.name for entry in target.parent.iterdir()] == ["target"]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["around", "packed"]
        assert not any(path.is_symlink() for path in target.rglob("*"))
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def refused(tmp_path: Path, data: bytes, limits: ValidationLimits = LIMITS) -> FileError:
    with pytest.raises(FileError) as caught:
        unpacked(tmp_path, data, limits)
    return caught.value


@pytest.mark.parametrize(
    ("data", "kind"), [(tar_of(FILES), "tar.gz"), (tar_of(FILES, ""), "tar"), (zip_of(FILES), "zip")]
)
def test_regular_files_come_out_as_they_went_in(tmp_path: Path, data: bytes, kind: str) -> None:
    assert unpacked(tmp_path, data) == FILES
    assert archive_kind(tmp_path / "packed") == kind


def test_the_litter_of_macos_is_left_out(tmp_path: Path) -> None:
    files = {"__MACOSX/._data.jsonl": b"x", "._data.jsonl": b"x", ".DS_Store": b"x", "data.jsonl": b"{}"}
    assert unpacked(tmp_path, zip_of(files)) == {"data.jsonl": b"{}"}


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize(
    "name",
    [
        "/etc/cron.d/x",
        "../x",
        "images/../../x",
        "a\\..\\x",
        "a/" + "n" * 256,
        "n/" * 600 + "x",
        "more.zip",
        "x.tar",
        "y.GZ",
    ],
)
def test_an_entry_that_leaves_the_target_or_nests_is_refused(tmp_path: Path, pack, name: str) -> None:
    error = refused(tmp_path, pack({"data.jsonl": b"{}", name: b"x"}))
    assert error.problem.code == "archive_entry_refused"
    assert error.problem.field


def tar_entry(member: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.addfile(member)
    return out.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("images/a.png")
    member.type, member.linkname = kind, "/etc/passwd"
    assert refused(tmp_path, tar_entry(member)).problem.code == "archive_entry_refused"


def test_a_file_through_a_link_of_the_archive_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        link = tarfile.TarInfo("images")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("images/escaped"))
    assert refused(tmp_path, out.getvalue()).problem.code == "archive_entry_refused"


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    """A few bytes that would be written as a terabyte of zeros."""
    member = tarfile.TarInfo("images/a.png")
    member.type = tarfile.GNUTYPE_SPARSE
    assert refused(tmp_path, tar_entry(member)).problem.code in ("archive_entry_refused", "broken_archive")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("images/a.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert refused(tmp_path, out.getvalue()).problem.code == "archive_entry_refused"


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_two_entries_for_one_place_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    assert refused(tmp_path, out.getvalue()).problem.code == "duplicate_entry"


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_a_bomb_stops_before_it_fills_the_disk(tmp_path: Path, pack) -> None:
    data = pack({"data.jsonl": bytes(200 * 2**20)})
    assert len(data) < 2**20
    assert refused(tmp_path, data).problem.code == "archive_bomb"
    written = sum(path.stat().st_size for path in (tmp_path / "around").rglob("*") if path.is_file())
    assert written <= 40 * 2**20


def test_a_bomb_in_a_header_is_a_bomb(tmp_path: Path) -> None:
    """tarfile reads extended headers whole: their bytes count as well."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 200 * 2**20
    data = gzip.compress(header.tobuf() + bytes(header.size) + bytes(1024))
    assert refused(tmp_path, data).problem.code == "archive_bomb"


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_the_limits_on_bytes_and_entries_hold(tmp_path: Path, pack) -> None:
    files = {f"{index}": os.urandom(1000) for index in range(20)}
    for limits in (ValidationLimits(max_archive_bytes=10_000), ValidationLimits(max_archive_entries=10)):
        case = tmp_path / str(limits.max_archive_entries)
        case.mkdir()
        assert refused(case, pack(files), limits).problem.code == "archive_too_large"


@pytest.mark.parametrize(
    ("pack", "tail"),
    [(tar_of, 0), (lambda files: tar_of(files, ""), 3072), (zip_of, 0)],  # a tar ends with 3072 bytes of padding here
    ids=["tar.gz", "tar", "zip"],
)
def test_an_archive_cut_anywhere_is_said_to_be_damaged(tmp_path: Path, pack, tail: int) -> None:
    data = pack({"data.jsonl": os.urandom(3000), "images/a.png": os.urandom(3000)})
    for length in range(600, len(data) - tail, 500):
        case = tmp_path / str(length)
        case.mkdir()
        assert refused(case, data[:length]).problem.code == "broken_archive", length


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_an_archive_with_flipped_bytes_is_said_to_be_damaged(tmp_path: Path, pack) -> None:
    data = bytearray(pack({"data.jsonl": os.urandom(3000)}))
    data[1500] ^= 0xFF
    assert refused(tmp_path, bytes(data)).problem.code == "broken_archive"


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    """tarfile by itself stops there in silence, and the rest of the pictures would be missing."""
    data = bytearray(tar_of(FILES, ""))
    data[1024 + 150] ^= 0xFF  # inside the checksum of the second header
    assert refused(tmp_path, bytes(data)).problem.code == "broken_archive"


def test_gzip_of_something_else_is_no_archive(tmp_path: Path) -> None:
    assert refused(tmp_path, gzip.compress(b'{"a": 1}\n' * 100)).problem.code == "broken_archive"


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of({"data.jsonl": b"{}"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    assert refused(tmp_path, bytes(data)).problem.code == "archive_entry_refused"


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize("names", [("a.png", "A.PNG"), ("\u00e9.png", "e\u0301.png"), ("x/a.png", "X/./a.png")])
def test_names_that_some_file_systems_hold_for_one_are_refused(tmp_path: Path, pack, names: tuple[str, str]) -> None:
    """On one machine's disk they would be two files, on another's the second would replace the first."""
    assert refused(tmp_path, pack(dict.fromkeys(names, b"x"))).problem.code == "duplicate_entry"
