"""What all benchmarks have in common: an item, its picture, and a set of items. Torch-free.

A picture stays encoded until it is needed: beside the benchmark file, or as the base64 text of a TSV cell.
Knows nothing about file formats (``sources``) or about scoring.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlm_dft.config import BenchmarkKind, ValidationLimits
from vlm_dft.errors import BenchmarkError

LIMITS = ValidationLimits()
"""The same as for training images."""


@dataclass(frozen=True)
class Picture:
    """One encoded image: a file, or base64 text."""

    place: str
    """File, row and field, for error messages."""
    path: Path | None = None
    base64_text: str = field(default="", repr=False)

    def encoded(self) -> bytes:
        """Raises BenchmarkError naming the place."""
        if self.path is None:
            return self._from_base64()
        try:
            if self.path.stat().st_size > LIMITS.max_image_bytes:
                raise self._error(f"{self.path} is larger than {LIMITS.max_image_bytes} bytes")
            return self.path.read_bytes()
        except OSError as error:
            raise self._error(
                f"{self.path} cannot be read ({error.strerror}): put the benchmark's image there"
            ) from None

    def size(self) -> tuple[int, int]:
        """(width, height) from the header."""
        with self._opened() as image:
            return image.size

    def media_type(self) -> str:
        """Such as image/png, from the header."""
        with self._opened() as image:
            found = Image.MIME.get(image.format or "", "")
        return found if found.startswith("image/") else "image/x-unknown"

    def decoded(self) -> Image.Image:
        """The picture in its own mode; what makes it RGB is the encoder's, as in training."""
        with self._opened() as image:
            try:
                return image.copy()
            except (OSError, SyntaxError, ValueError) as error:
                raise self._error(f"the image is damaged ({error}): fetch the benchmark again") from None

    def _opened(self) -> Image.Image:
        data = self.encoded()
        try:
            image = Image.open(io.BytesIO(data))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
            raise self._error("not an image that Pillow reads, or an absurdly large one") from None
        width, height = image.size
        if width * height > LIMITS.max_image_pixels:
            raise self._error(f"{width} x {height} pixels are more than {LIMITS.max_image_pixels}")
        return image

    def _from_base64(self) -> bytes:
        if len(self.base64_text) > LIMITS.max_image_bytes * 4 // 3 + 4:
            raise self._error(f"the image is larger than {LIMITS.max_image_bytes} bytes")
        try:
            return base64.b64decode(self.base64_text, validate=True)
        except (binascii.Error, ValueError):
            raise self._error("the cell is not base64 text") from None

    def _error(self, reason: str) -> BenchmarkError:
        return BenchmarkError(f"{self.place}: {reason}")


@dataclass(frozen=True)
class Item:
    """One question of a benchmark, ready to be asked and graded."""

    id: str
    """Unique in its benchmark."""
    group: str
    """Items that are scored or sampled together: a problem's versions, a We-Math step group."""
    prompt: str
    """What the model reads after the picture."""
    picture: Picture | None
    answer: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text; empty for a free-form question."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Such as subject -> algebra."""
    question: str = ""
    """The question alone, for judges and comparisons; empty where the prompt holds nothing else."""

    @property
    def asked(self) -> str:
        """The question, without instructions where the benchmark's file has it apart."""
        return self.question or self.prompt

    def fingerprint(self) -> str:
        """Hash over everything that decides what is asked and what is right."""
        picture = hashlib.sha256(self.picture.encoded()).hexdigest() if self.picture else None
        content = [self.id, self.group, self.prompt, picture, self.answer, dict(self.options), dict(self.categories)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Benchmark:
    """The items of one benchmark file, or the first of them."""

    kind: BenchmarkKind
    path: Path
    """The file that was read."""
    items: tuple[Item, ...]
    num_total: int
    """Items in the file."""

    def first(self, limit: int | None) -> Benchmark:
        """At most limit items, by whole groups in file order; the first group is always taken whole.

        A We-Math item alone cannot be scored, and a MathVerse problem is one problem in five versions.
        """
        if limit is None or limit >= len(self.items):
            return self
        groups: dict[str, list[Item]] = {}
        for item in self.items:
            groups.setdefault(item.group, []).append(item)
        chosen: set[str] = set()
        count = 0
        for group, items in groups.items():
            if chosen and count + len(items) > limit:
                break
            chosen.add(group)
            count += len(items)
        return replace(self, items=tuple(item for item in self.items if item.group in chosen))

    @property
    def is_whole_file(self) -> bool:
        return len(self.items) == self.num_total

    @cached_property
    def sha256(self) -> str:
        """Hash over the items' content in any order; equal for the same questions, however they were stored."""
        return hashlib.sha256("".join(sorted(item.fingerprint() for item in self.items)).encode()).hexdigest()
