"""Every picture that training could stumble over is found before, by its header where that is enough."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from data_samples import data_uri, picture
from PIL import Image, PngImagePlugin

from vlm_dft.config import PixelConfig, ValidationLimits
from vlm_dft.data.images import ImageInfo, decode_data_uri, inspect
from vlm_dft.data.problems import RowError

LIMITS = ValidationLimits()


def looked_at(data: bytes, limits: ValidationLimits = LIMITS, pixels: PixelConfig | None = None) -> ImageInfo:
    return inspect(data, "image_path", limits, pixels or PixelConfig())


def code(data: bytes, limits: ValidationLimits = LIMITS, pixels: PixelConfig | None = None) -> str:
    with pytest.raises(RowError) as caught:
        looked_at(data, limits, pixels)
    assert caught.value.field == "image_path"
    return caught.value.reason_code


def png_of(width: int, height: int, *, pixels: bytes = b"") -> bytes:
    """A PNG that says how large it is and holds whatever it likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def noise(file_format: str) -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", (100, 60), os.urandom(100 * 60 * 3)).save(out, file_format)
    return out.getvalue()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_usable_pictures_keep_their_size_and_name(file_format: str) -> None:
    info = looked_at(noise(file_format))
    assert (info.width, info.height) == (100, 60)
    assert info.extension == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[file_format]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_ordinary_pixel_formats_are_usable(mode: str) -> None:
    assert looked_at(picture(mode=mode)).width == 56


def test_real_photographs_are_usable(shared_data: Path) -> None:
    paths = sorted((shared_data / "demo_images").glob("*.jpg"))
    assert len(paths) == 9
    for path in paths:
        assert max(looked_at(path.read_bytes()).width, looked_at(path.read_bytes()).height) <= 512


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_picture_is_found(file_format: str, share: float) -> None:
    data = noise(file_format)
    assert code(data[: int(len(data) * share)]) in ("image_truncated", "image_undecodable")


def test_every_cut_of_a_photograph_is_found(shared_data: Path) -> None:
    data = (shared_data / "demo_images" / "coffee.jpg").read_bytes()
    for length in range(100, len(data) - 2, len(data) // 20):
        assert code(data[:length]) in ("image_truncated", "image_undecodable", "not_an_image"), length


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", picture(file_format="GIF")])
def test_what_is_no_picture_is_found(data: bytes) -> None:
    assert code(data) in ("not_an_image", "image_undecodable")


def test_an_empty_file_is_found() -> None:
    assert code(b"") == "image_empty"


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_an_animated_picture_is_refused(file_format: str) -> None:
    frames = [Image.new("RGB", (56, 28), color) for color in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, file_format, save_all=True, append_images=frames[1:], duration=100)
    assert code(out.getvalue()) == "image_animated"


def test_a_jpeg_with_a_second_picture_behind_it_is_a_jpeg() -> None:
    """Telephones write such files (MPO); the first picture is what every viewer shows."""
    out = io.BytesIO()
    Image.new("RGB", (56, 28)).save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (28, 28))])
    assert (looked_at(out.getvalue()).width, looked_at(out.getvalue()).extension) == (56, "jpg")


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (3, 3)])
def test_a_tracking_pixel_is_refused(size: tuple[int, int]) -> None:
    assert code(picture(*size)) == "image_too_small"


@pytest.mark.parametrize("size", [(2000, 8), (8, 2000)])
def test_an_elongated_picture_is_refused(size: tuple[int, int]) -> None:
    assert code(picture(*size)) == "image_aspect_ratio"


def test_a_picture_without_room_under_max_pixels_is_refused() -> None:
    assert code(picture(1000, 20), pixels=PixelConfig(min_pixels=784, max_pixels=4 * 784)) == "image_aspect_ratio"


def test_sixteen_bit_greyscale_is_refused() -> None:
    """Converted to RGB it becomes white."""
    assert code(picture(mode="I;16", color=40_000)) == "image_mode"


def test_a_huge_picture_is_refused_by_its_header_alone() -> None:
    assert code(png_of(20_000, 20_000)) == "image_too_many_pixels"
    assert code(png_of(2**31 - 1, 2**31 - 1)) == "image_too_many_pixels"
    assert code(png_of(9000, 10_001)) == "image_too_many_pixels"  # where Pillow itself would only warn


def test_nine_kilobytes_that_unpack_to_hundreds_of_megabytes_are_not_unpacked() -> None:
    data = picture(8600, 8600, mode="1", optimize=True)
    assert len(data) < 9200
    tracemalloc.start()
    assert code(data) == "image_too_many_pixels"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L"])
def test_a_huge_webp_canvas_is_refused_before_pillow_allocates_it(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("opened"))
    if kind == b"VP8X":
        body = bytes(4) + (16_383).to_bytes(3, "little") * 2
    else:
        body = b"\x2f" + (16_383 | 16_383 << 14).to_bytes(4, "little") + bytes(8)
    data = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    assert code(b"RIFF" + struct.pack("<I", len(data)) + data) == "image_too_many_pixels"


@pytest.mark.parametrize("lossless", [True, False])
def test_the_webp_header_is_read_as_pillow_reads_it(lossless: bool) -> None:
    data = picture(211, 97, file_format="WEBP", lossless=lossless)
    assert code(data, ValidationLimits(max_image_pixels=211 * 97 - 1)) == "image_too_many_pixels"
    assert looked_at(data, ValidationLimits(max_image_pixels=211 * 97)).width == 211


def test_a_bomb_in_a_text_chunk_is_an_undecodable_picture() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 80 * 2**20, zip=True)
    assert code(picture(pnginfo=info)) == "image_undecodable"


def test_too_many_encoded_bytes_are_refused() -> None:
    assert code(noise("PNG"), ValidationLimits(max_image_bytes=1000)) == "image_too_large"


def test_a_data_uri_gives_back_its_bytes() -> None:
    data = picture()
    assert decode_data_uri(data_uri(data), "url", LIMITS) == data


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data:image/png;base64,####", "invalid_data_uri"),
        ("data:image/png;base64,QUJD\n", "invalid_data_uri"),
        ("data:image/png;base64,é", "invalid_data_uri"),
        ("data:image/png,abc", "invalid_data_uri"),
        ("data:text/html;base64,QUJD", "invalid_data_uri"),
        ("data:image/png;base64", "invalid_data_uri"),
        ("data:image/png;base64," + "A" * 4000, "image_too_large"),
    ],
)
def test_a_broken_data_uri_is_refused(uri: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        decode_data_uri(uri, "url", ValidationLimits(max_image_bytes=1000))
    assert caught.value.reason_code == expected
    assert len(caught.value.reason) < 200
