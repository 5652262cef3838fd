"""Canonical datasets of conversations about pictures, made from numbers: what the benchmarks train on.

The pictures are JPEG files with about the detail of photographs; the words are drawn from a vocabulary of their own, on
which a tokenizer of a wanted size can be trained.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_dft.data.canonical import MANIFEST_NAME, ROWS_NAME, ImagePart, Manifest, Message, Row, TextPart

_SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]


def words(count: int, seed: int = 0) -> list[str]:
    """Different words of two to four syllables."""
    generator = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choice(_SYLLABLES, generator.integers(2, 5)))] = None
    return list(found)


def write_dataset(path: Path, rows: Sequence[Row]) -> Path:
    """A complete dataset; the rows' pictures are below path already."""
    text = "".join(row.model_dump_json() + "\n" for row in rows)
    (path / ROWS_NAME).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = Manifest(rows=len(rows), format="openai", filename="benchmark", image_root=".", fingerprint=digest)
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return path


def conversation(number: int, picture: ImagePart, question: str, answer: str) -> Row:
    turns = (
        Message(role="user", content=(picture, TextPart(text=question))),
        Message(role="assistant", content=(TextPart(text=answer),)),
    )
    return Row(id=f"benchmark:{number + 1}", messages=turns)


def write_picture(path: Path, size: tuple[int, int], seed: int) -> ImagePart:
    """A JPEG file of quality 90 below the dataset path."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    name = f"images/{digest}.jpg"
    (path / "images").mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(buffer.getvalue())
    return ImagePart(image=name, sha256=digest, width=size[0], height=size[1])
