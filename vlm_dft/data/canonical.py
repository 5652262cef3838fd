"""The canonical dataset: what validation writes and training reads. Torch-free.

    DATASET/
    ├── dataset.json    Manifest, written last: its existence means that the dataset is complete
    ├── rows.jsonl      one Row per line
    └── images/         content-addressed copies, <sha256>.<ext>; absent for datasets registered by server path

Images are named relative to the manifest's image_root (the dataset itself, or the registered directory).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from vlm_dft.config import Frozen
from vlm_dft.errors import DatasetError

MANIFEST_NAME = "dataset.json"
ROWS_NAME = "rows.jsonl"
IMAGES_NAME = "images"


class TextPart(Frozen):
    """Literal text: media tags in it were escaped, it never stands for a picture."""

    type: Literal["text"] = "text"
    text: str


class ImagePart(Frozen):
    """One picture at this place of the turn."""

    type: Literal["image"] = "image"
    image: str
    """Path relative to the manifest's image_root."""
    sha256: str
    """Of the encoded file."""
    width: int
    height: int


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Frozen):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Part, ...]
    train: bool = True
    """Whether an assistant turn is supervised (OpenAI's weight 0 or 1)."""


class Row(Frozen):
    """One sample."""

    id: str
    """file:line of the source, for error messages and predictions."""
    messages: tuple[Message, ...]
    answer: str | None = None
    """Reference answer, where the format has one."""
    category: str | None = None
    text_tokens: int | None = None
    """Tokens without visual ones, as the manifest's tokenizer counts them through the chat template."""
    supervised_tokens: int | None = None

    @property
    def images(self) -> list[ImagePart]:
        return [part for message in self.messages for part in message.content if isinstance(part, ImagePart)]


class Manifest(Frozen):
    """dataset.json."""

    version: Literal[1] = 1
    rows: int
    format: str
    filename: str
    image_root: str
    """Absolute, or "." for the dataset directory itself."""
    fingerprint: str
    tokenizer_sha256: str | None = None
    """Of the tokenizer that counted text_tokens."""


@dataclass(frozen=True)
class CanonicalDataset:
    """A complete canonical dataset on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> CanonicalDataset:
        """Raises DatasetError when path holds no complete dataset."""
        try:
            manifest = Manifest.model_validate_json((path / MANIFEST_NAME).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetError(f"{path} holds no {MANIFEST_NAME}: it is not a complete validated dataset") from None
        except ValidationError as error:
            raise DatasetError(f"{path / MANIFEST_NAME} cannot be read: {error.errors()[0]['msg']}") from None
        return cls(path, manifest)

    @property
    def image_root(self) -> Path:
        return self.path if self.manifest.image_root == "." else Path(self.manifest.image_root)

    def image_path(self, part: ImagePart) -> Path:
        return self.image_root / part.image

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[Row]:
        with (self.path / ROWS_NAME).open() as file:
            for line in file:
                yield Row.model_validate(json.loads(line))
