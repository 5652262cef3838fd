"""Is this a picture that training can use? Decoded whole, under limits, its header read first. Torch-free.

JPEG, PNG and WebP. Nothing is resized, repaired or converted: what cannot be used as it is, is reported.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlm_dft.config import PixelConfig, ValidationLimits
from vlm_dft.data.pixels import resized_size
from vlm_dft.data.problems import RowError, shown
from vlm_dft.errors import DatasetError

MIN_SIDE = 4
"""Pixels; a picture of fewer is a tracking pixel or a mistake."""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with a second picture behind it
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "La", "RGBa", "RGBX"})
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged data."""


@dataclass(frozen=True)
class ImageInfo:
    """A usable picture."""

    sha256: str
    width: int
    height: int
    extension: str


def read_image(path: Path, field: str, limits: ValidationLimits) -> bytes:
    """The encoded bytes, at most one more than allowed. Raises RowError when they cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(limits.max_image_bytes + 1)
    except OSError as error:
        raise RowError(field, "image_unreadable", f"{shown(path.name)} cannot be read: {error.strerror}") from None


def decode_data_uri(uri: str, field: str, limits: ValidationLimits) -> bytes:
    """The bytes of a data:image/...;base64, URI. Raises RowError."""
    head, comma, body = uri.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        reason = f"data:image/<type>;base64,<data> is expected, not {shown(head)}"
        raise RowError(field, "invalid_data_uri", reason)
    if len(body) // 4 * 3 > limits.max_image_bytes + 3:
        raise _too_many_bytes(field, limits)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(field, "invalid_data_uri", f"the data: URI is no base64: {error}") from None


def inspect(data: bytes, field: str, limits: ValidationLimits, pixels: PixelConfig) -> ImageInfo:
    """Check an encoded picture. Raises RowError with the reason."""
    if not data:
        raise RowError(field, "image_empty", "the image has no bytes")
    if len(data) > limits.max_image_bytes:
        raise _too_many_bytes(field, limits)
    webp_size = _webp_canvas(data)
    if webp_size:  # Pillow allocates a WebP's canvas when it opens it
        _check_size(*webp_size, field, limits, pixels)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_size(*image.size, field, limits, pixels)
            _check_kind(image, field)
            image.load()
            width, height = image.size
            extension = _EXTENSIONS[str(image.format)]
    except RowError:
        raise
    except UnidentifiedImageError:
        reason = f"the data is no JPEG, PNG or WebP image; it starts with {shown(data[:16])}"
        raise RowError(field, "not_an_image", reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(field, "", limits) from None
    except MemoryError:
        raise RowError(field, "image_needs_too_much_memory", "decoding the image needs too much memory") from None
    except _UNDECODABLE as error:
        code = "image_truncated" if "truncated" in str(error).lower() else "image_undecodable"
        raise RowError(field, code, f"the image cannot be decoded: {error}") from None
    return ImageInfo(hashlib.sha256(data).hexdigest(), width, height, extension)


def _too_many_bytes(field: str, limits: ValidationLimits) -> RowError:
    reason = f"the encoded image is larger than {limits.max_image_bytes} bytes: shrink it"
    return RowError(field, "image_too_large", reason)


def _too_many_pixels(field: str, size: str, limits: ValidationLimits) -> RowError:
    reason = f"the image{size} has more than {limits.max_image_pixels} pixels: shrink it"
    return RowError(field, "image_too_many_pixels", reason)


def _check_size(width: int, height: int, field: str, limits: ValidationLimits, pixels: PixelConfig) -> None:
    if width * height > limits.max_image_pixels:
        raise _too_many_pixels(field, f" of {width} x {height}", limits)
    if min(width, height) < MIN_SIDE:
        reason = f"an image of {width} x {height} pixels is too small: each side needs at least {MIN_SIDE}"
        raise RowError(field, "image_too_small", reason)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        reason = (
            f"an image of {width} x {height} is more elongated than {limits.max_aspect_ratio:g} to 1: crop or pad it"
        )
        raise RowError(field, "image_aspect_ratio", reason)
    try:
        resized_size(width, height, pixels)
    except DatasetError as error:
        raise RowError(field, "image_aspect_ratio", error.message) from None


def _check_kind(image: Image.Image, field: str) -> None:
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        reason = f"the image is animated ({getattr(image, 'n_frames', 0)} frames): save the one frame that is meant"
        raise RowError(field, "image_animated", reason)
    if image.mode not in _MODES:
        reason = f"the image's pixel format {image.mode} would lose its values: save it with 8 bits per channel"
        raise RowError(field, "image_mode", reason)


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a WebP header; None for other data, or a header that Pillow may judge."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None
