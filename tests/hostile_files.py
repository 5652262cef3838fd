"""Hostile uploads, built by code: what each is, and the code of the problem that it must end with."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from data_samples import data_uri, image_part, jsonl, openai_row, picture, tar_of, wethink_row, zip_of
from PIL import Image

ROWS = jsonl(wethink_row())


def tar_with(*members: tarfile.TarInfo, data: bytes = b"") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(data) if member.size else None)
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_entry(name: str, data: bytes = b"x", *, mode: int = 0, packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        entry.compress_type = packing
        archive.writestr(entry, data)
    return out.getvalue()


def encrypted_zip() -> bytes:
    data = bytearray(zip_entry("data.jsonl", ROWS))
    data[6] |= 1  # the flag in the local header, and below in the directory
    place = data.index(b"PK\x01\x02")
    data[place + 8] |= 1
    return bytes(data)


def lying_zip() -> bytes:
    """A directory that promises ten bytes for an entry that unpacks to a megabyte."""
    data = bytearray(zip_entry("data.jsonl", b"\0" * 2**20))
    place = data.index(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", 10)
    return bytes(data)


def pax_bomb() -> bytes:
    """A header that unpacks to 64 MiB."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as packed:
        head = tarfile.TarInfo("pax")
        head.type, head.size = tarfile.XHDTYPE, 64 * 2**20
        packed.write(head.tobuf())
        for _ in range(64):
            packed.write(b"\0" * 2**20)
    return out.getvalue()


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    """A canvas that Pillow would allocate when it opens the file."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size + b"VP8 " + struct.pack("<I", 0)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


def pixels_of(file_format: str, mode: str) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (64, 64)).save(out, file_format)
    return out.getvalue()


def shown(data: bytes) -> bytes:
    """A file of one row with this picture in it."""
    return jsonl(openai_row([image_part(data_uri(data))], "A circle."))


def naming(path: str) -> bytes:
    """An archive of one row whose picture has this path."""
    return tar_of({"data.jsonl": jsonl(wethink_row(image_path=path)), "images/a.png": picture()})


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("this pickle was loaded",)


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "tar entry with an absolute path": (tar_of({"/etc/cron.d/x": b"x"}), "archive_entry_refused"),
    "tar entry that leaves by ..": (tar_of({"a/../../x": b"x"}), "archive_entry_refused"),
    "tar symbolic link": (tar_with(member("l", tarfile.SYMTYPE, linkname="/etc")), "archive_entry_refused"),
    "tar hard link": (tar_with(member("l", tarfile.LNKTYPE, linkname="/etc/passwd")), "archive_entry_refused"),
    "tar character device": (tar_with(member("d", tarfile.CHRTYPE, devmajor=1)), "archive_entry_refused"),
    "tar block device": (tar_with(member("d", tarfile.BLKTYPE, devmajor=8)), "archive_entry_refused"),
    "tar pipe": (tar_with(member("p", tarfile.FIFOTYPE)), "archive_entry_refused"),
    "tar sparse file": (tar_with(member("s", tarfile.GNUTYPE_SPARSE)), "archive_entry_refused"),
    "tar entry with a backslash": (tar_of({"..\\x": b"x"}), "archive_entry_refused"),
    "tar entry with a name of 2000 letters": (tar_of({"a/" * 1000: b"x"}), "archive_entry_refused"),
    "tar entry with a part of 300 letters": (tar_of({"a" * 300: b"x"}), "archive_entry_refused"),
    "tar entries that differ by case": (tar_of({"data.jsonl": ROWS, "DATA.jsonl": ROWS}), "duplicate_entry"),
    "tar file that is a directory too": (tar_of({"a": b"x", "a/b": b"x"}), "duplicate_entry"),
    "tar twice the same entry": (tar_with(*[member("a", size=1)] * 2, data=b"x"), "duplicate_entry"),
    "tar in a tar": (tar_of({"more.tar.gz": tar_of({"data.jsonl": ROWS})}), "archive_entry_refused"),
    "tar cut off": (tar_of({"data.jsonl": ROWS * 1000}, "")[:5000], "broken_archive"),
    "gzip cut off": (tar_of({"data.jsonl": ROWS * 1000})[:200], "broken_archive"),
    "gzip with a wrong checksum": (tar_of({"data.jsonl": ROWS})[:-8] + b"\0" * 8, "broken_archive"),
    "gzip bomb": (tar_of({"data.jsonl": b"\0" * 50 * 2**20}), "archive_bomb"),
    "gzip bomb in a header": (pax_bomb(), "archive_bomb"),
    "zip bomb": (zip_of({"data.jsonl": b"\0" * 50 * 2**20}), "archive_bomb"),
    "zip that lies about a size": (lying_zip(), "broken_archive"),
    "zip symbolic link": (zip_entry("l", b"/etc/passwd", mode=0o120777), "archive_entry_refused"),
    "zip entry that leaves by ..": (zip_entry("../x"), "archive_entry_refused"),
    "zip entry with an absolute path": (zip_entry("/x"), "archive_entry_refused"),
    "zip packed by lzma": (zip_entry("data.jsonl", ROWS, packing=zipfile.ZIP_LZMA), "archive_entry_refused"),
    "zip encrypted": (encrypted_zip(), "archive_entry_refused"),
    "zip cut off": (zip_of({"data.jsonl": ROWS * 100})[:-30], "broken_archive"),
    "zip with a pickled dataset": (zip_of({"data.pkl": pickle.dumps(Payload())}), "no_data_file"),
    "zip without rows": (zip_of({"readme.txt": b"x"}), "no_data_file"),
}
IMAGES: dict[str, tuple[bytes, str]] = {
    "png bomb of 231 MB": (shown(picture(8600, 8600, mode="1", optimize=True)), "image_too_many_pixels"),
    "png that says it is 2 gigapixels": (shown(png_of(65535, 32767)), "image_too_many_pixels"),
    "webp that says it is 16383 x 16383": (shown(webp_of(16383, 16383)), "image_too_many_pixels"),
    "png without its pixels": (shown(png_of(64, 64)), "image_truncated"),
    "jpeg cut in half": (shown(pixels_of("JPEG", "RGB")[:300]), "image_truncated"),
    "gif": (shown(pixels_of("GIF", "P")), "not_an_image"),
    "tiff of floats": (shown(pixels_of("TIFF", "F")), "not_an_image"),
    "eps, which runs a program": (shown(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not_an_image"),
    "svg with a script": (shown(b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"), "not_an_image"),
    "web page": (shown(b"<html>" * 10), "not_an_image"),
    "pickle": (shown(pickle.dumps(Payload())), "not_an_image"),
    "animated webp": (shown(animated()), "image_animated"),
    "png of 16 bits": (shown(pixels_of("PNG", "I;16")), "image_mode"),
    "tracking pixel": (shown(picture(1, 1)), "image_too_small"),
    "ribbon of 1 to 1000": (shown(picture(8000, 8)), "image_aspect_ratio"),
    "no bytes": (shown(b""), "image_empty"),
    "data URI without base64": (jsonl(openai_row([image_part("data:image/png,abc")], "x")), "invalid_data_uri"),
}
REFERENCES: dict[str, tuple[bytes, str]] = {
    "picture path that leaves by ..": (naming("../../etc/passwd"), "image_path_refused"),
    "absolute picture path": (naming("/etc/passwd"), "image_path_refused"),
    "file URL": (jsonl(openai_row([image_part("file:///etc/passwd")], "x")), "image_path_refused"),
    "picture path of a home directory": (naming("~root/.ssh/id_rsa"), "image_path_refused"),
    "picture path with a NUL": (naming("images/a.png\0.jpg"), "image_path_refused"),
    "picture that is a directory": (naming("images"), "image_not_a_file"),
    "http URL": (jsonl(openai_row([image_part("http://example.com/a.png")], "x")), "image_url_refused"),
    "cloud metadata": (jsonl(openai_row([image_part("https://169.254.169.254/latest")], "x")), "image_url_refused"),
}
ROW_FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty_file"),
    "pickle": (pickle.dumps(Payload()), "not_json"),
    "program": (b"\x7fELF" + b"\0" * 100, "not_json"),
    "parquet": (b"PAR1" + b"\0" * 100, "not_json"),
    "UTF-16": (ROWS.decode().encode("utf-16"), "not_json"),
    "row nested 100,000 deep": (b'{"messages":' + b"[" * 100_000, "nested_too_deeply"),
    "array nested 100,000 deep": (b"[" * 100_000, "invalid_json"),
    "number of 10,000 digits": (b'{"messages": ' + b"9" * 10_000 + b"}", "invalid_json"),
    "NaN": (b'{"messages": NaN}', "invalid_json"),
    "bytes that are no text": (b'{"messages": "\xff\xfe"}', "invalid_utf8"),
    "row of no known form": (json.dumps({"a": 1}).encode(), "unknown_format"),
    "line that is no object": (jsonl(openai_row()) + b"[1]\n", "row_not_object"),
    "array cut off": (b"[" + ROWS.strip(), "invalid_json"),
}
FILES = {
    f"{group}: {name}": entry
    for group, entries in (
        ("archive", ARCHIVES),
        ("image", IMAGES),
        ("reference", REFERENCES),
        ("rows", ROW_FILES),
    )
    for name, entry in entries.items()
}
