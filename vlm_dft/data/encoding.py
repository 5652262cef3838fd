"""From a row to tensors: token ids with image tokens expanded, labels on assistant turns, pixels.

Training and evaluation both come through here, so they see the same pixels: pictures are resized by qwen_vl_utils (PIL)
to the run's pixel limits, and the model's own image processor only normalises them.

Shape suffixes: T tokens of one sample, P image patches, D values of one patch (3 x 2 x 14 x 14), I images, 3 = t, h, w.
Knows nothing about batches (``collate``) or models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image
from qwen_vl_utils import fetch_image
from torch import Tensor

from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import CanonicalDataset, ImagePart, Message, Row
from vlm_dft.data.pixels import MERGE_SIZE, num_visual_tokens, patch_grid, resized_size
from vlm_dft.data.template import ChatTemplate, Rendered
from vlm_dft.errors import DatasetError

IGNORED = -100
"""Label of a token that is not supervised."""

IMAGE_BACKEND = (
    f"qwen-vl-utils {version('qwen-vl-utils')} resize with pillow {version('pillow')}, "
    f"normalise with torchvision {version('torchvision')}"
)
"""How pixels are made; scores and models made by different ones do not compare exactly."""


@dataclass(frozen=True)
class Sample:
    """One row, ready to be collated."""

    row_id: str
    input_ids_T: Tensor
    labels_T: Tensor
    """Equal to input_ids where supervised, IGNORED elsewhere; not shifted."""
    mm_token_type_ids_T: Tensor | None
    """1 at image tokens, 0 elsewhere; None for text models."""
    pixel_values: Tensor | None
    """P x D, float32, already normalised; or uint8 patches to be normalised on the device (``patch_cache``)."""
    image_grid_thw: Tensor | None
    """I x 3, in patches; None without images."""
    images: tuple[ImagePart, ...] = ()
    """The row's pictures; not of prompts."""
    image_features: Tensor | None = None
    """Visual tokens x hidden size, instead of pixel_values (``vision_cache``)."""

    def __len__(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels_T != IGNORED).sum())


class Encoder:
    """Encodes rows and prompts for one model under one pixel configuration."""

    def __init__(self, processor: Any, pixels: PixelConfig) -> None:
        """processor: as load gives it. Raises ModelError when its chat template cannot be trained with."""
        self.template = ChatTemplate.of(processor)
        self.pixels = pixels
        self._image_processor = processor.image_processor if self.template.vision else None

    def num_tokens(self, row: Row) -> int:
        """Length of the encoded row, text and visual tokens, without opening an image."""
        visual = sum(num_visual_tokens(part.width, part.height, self.pixels) for part in row.images)
        return self.template.render(row).text_tokens + visual

    def encode(self, row: Row, dataset: CanonicalDataset) -> Sample:
        """Tensors of a row. Raises DatasetError naming row and path when an image is not what was validated."""
        rendered = self.template.render(row)
        images = [self._validated_image(dataset.image_path(part), part, row.id) for part in row.images]
        sample = self._sample(row.id, rendered, self._pixels(images, row.id))
        return dataclasses.replace(sample, images=tuple(row.images))

    def encode_tokens(self, row: Row) -> Sample:
        """The same without pixel_values: no image is opened."""
        grids = [patch_grid(part.width, part.height, self.pixels) for part in row.images]
        sample = self._sample(row.id, self.template.render(row), (None, torch.tensor(grids) if grids else None))
        return dataclasses.replace(sample, images=tuple(row.images))

    def picture(self, part: ImagePart, dataset: CanonicalDataset, row_id: str) -> Image.Image:
        """The resized picture as RGB. Raises DatasetError naming row and path when it is not what was validated."""
        return self._resized(self._validated_image(dataset.image_path(part), part, row_id), row_id)

    def encode_prompt(
        self, messages: Sequence[Message], images: Sequence[Path | Image.Image] = (), *, row_id: str = "prompt"
    ) -> Sample:
        """Tensors up to where the model starts to answer; images are those of messages' ImageParts, in order.

        Raises DatasetError naming row_id for an image that cannot be opened.
        """
        rendered = self.template.render_prompt(messages, row_id)
        opened = [
            _decoded(_read(image, row_id), image, row_id) if isinstance(image, Path) else image for image in images
        ]
        return self._sample(row_id, rendered, self._pixels(opened, row_id))

    def encode_turns(self, messages: Sequence[Message], dataset: CanonicalDataset, row_id: str) -> Sample:
        """encode_prompt of turns of one of dataset's rows. Raises DatasetError as encode does."""
        parts = [part for message in messages for part in message.content if isinstance(part, ImagePart)]
        images = [self._validated_image(dataset.image_path(part), part, row_id) for part in parts]
        return self.encode_prompt(messages, images, row_id=row_id)

    def _validated_image(self, path: Path, part: ImagePart, row_id: str) -> Image.Image:
        data = _read(path, row_id)
        found = hashlib.sha256(data).hexdigest()
        if found != part.sha256:
            raise DatasetError(
                f"row {row_id}: image {path} changed since it was validated (sha256 {found[:12]}, was "
                f"{part.sha256[:12]}): restore it, or validate the file again"
            )
        return _decoded(data, path, row_id)

    def _sample(self, row_id: str, rendered: Rendered, pictures: tuple[Tensor | None, Tensor | None]) -> Sample:
        """pictures: patches and grids."""
        pixel_values_PD, grid_I3 = pictures
        counts = [] if grid_I3 is None else (grid_I3.prod(-1) // MERGE_SIZE**2).tolist()
        if len(counts) != len(rendered.image_positions):
            raise DatasetError(f"row {row_id}: {len(counts)} images for {len(rendered.image_positions)} image parts")
        repeats_T = torch.ones(len(rendered.input_ids), dtype=torch.long)
        if counts:
            repeats_T[rendered.image_positions] = torch.tensor(counts)
        is_image_T = torch.zeros(len(rendered.input_ids), dtype=torch.long)
        is_image_T[rendered.image_positions] = 1
        input_ids_T = torch.tensor(rendered.input_ids, dtype=torch.long)
        labels_T = input_ids_T.masked_fill(~torch.tensor(rendered.supervised, dtype=torch.bool), IGNORED)
        return Sample(
            row_id=row_id,
            input_ids_T=input_ids_T.repeat_interleave(repeats_T),
            labels_T=labels_T.repeat_interleave(repeats_T),
            mm_token_type_ids_T=is_image_T.repeat_interleave(repeats_T) if self.template.vision else None,
            pixel_values=pixel_values_PD,
            image_grid_thw=grid_I3,
        )

    def _pixels(self, images: list[Image.Image], row_id: str) -> tuple[Tensor | None, Tensor | None]:
        """Patches and grids."""
        if not images or self._image_processor is None:
            return None, None
        resized = [self._resized(image, row_id) for image in images]
        features = self._image_processor(images=resized, do_resize=False, return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"]

    def _resized(self, image: Image.Image, row_id: str) -> Image.Image:
        try:
            resized_size(image.width, image.height, self.pixels)
        except DatasetError as error:
            raise DatasetError(f"row {row_id}: {error.message}") from None
        request: Any = {"image": image, "min_pixels": self.pixels.min_pixels, "max_pixels": self.pixels.max_pixels}
        return fetch_image(request)


def _read(path: Path, row_id: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"row {row_id}: image {path} cannot be read: {error.strerror}: restore it") from None


def _decoded(data: bytes, path: Path, row_id: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"row {row_id}: image {path} cannot be decoded: {error}") from None
    return image
