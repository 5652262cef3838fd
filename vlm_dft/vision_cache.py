"""A frozen vision tower's features: computed once per picture, read from memory-mapped files at every step.

While tower and merger keep their weights, their output is a function of the picture, so a training needs them once, and
no pixels afterwards. Every picture is computed by itself: its features do not depend on what shared its micro-batch.
The files are named by the picture's hash, in a directory named by all else that the numbers depend on: pixel limits,
the tower's weights, the type they are computed in, the device and the libraries.
Knows nothing about how a training goes on; ``vision_inputs`` hands the features to the model.

Shapes: P patches, D values of one patch, M visual tokens, H hidden size of the language model, I images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vlm_dft.batches import start_loader_process
from vlm_dft.config import TrainConfig
from vlm_dft.data.canonical import CanonicalDataset, ImagePart
from vlm_dft.data.encoding import IMAGE_BACKEND, Encoder, Sample
from vlm_dft.data.patch_cache import Normalisation, patches_of
from vlm_dft.data.pixels import num_visual_tokens, patch_grid
from vlm_dft.data.tensor_files import TensorFiles
from vlm_dft.errors import ConfigError, VlmDftError
from vlm_dft.model import LoadedModel, base_of
from vlm_dft.ranks import Ranks
from vlm_dft.vision_inputs import takes_features

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """Where a picture is, and in which row, for messages."""

    part: ImagePart
    encoder: Encoder
    dataset: CanonicalDataset
    row_id: str

    def patches(self) -> Tensor:
        """P x D, uint8. Raises DatasetError."""
        return patches_of(self.encoder.picture(self.part, self.dataset, self.row_id))


class VisionCache:
    """The features that one model's vision tower makes of pictures under one pixel configuration."""

    def __init__(self, loaded: LoadedModel, config: TrainConfig) -> None:
        """loaded.model has requires_grad set. Raises ConfigError where features would not stay true."""
        assert config.vision_cache is not None, "asked for"
        _check(loaded, config)
        self._loaded = loaded
        self._pixels = config.pixels
        self._hidden_size: int = base_of(loaded.model).config.vision_config.out_hidden_size
        self._files = TensorFiles(config.vision_cache, _settings(loaded, config), loaded.dtype)

    def attach(self, sample: Sample) -> Sample:
        """A sample without pixels, with its pictures' features. Raises ConfigError when their files have gone."""
        if not sample.images:
            return sample
        features = [self._features(part, sample.row_id) for part in sample.images]
        return dataclasses.replace(sample, image_features=features[0] if len(features) == 1 else torch.cat(features))

    def build(self, pictures: Mapping[str, Picture], ranks: Ranks, num_workers: int) -> None:
        """Compute what is missing of pictures, by hash; this rank's share of it. Tells the size of all first.

        The tower's weights are in the type of computation. num_workers: processes that decode ahead. Raises
        ConfigError and DiskFullError when the features have no room, DatasetError for a picture that has changed.
        """
        shapes = {name: self._shape(picture.part) for name, picture in pictures.items()}
        missing = self._files.reserve(shapes, what="the vision features", param="vision_cache")
        size_gib = sum(map(self._files.num_bytes, shapes.values())) / 2**30
        log.info("vision features of %d images: %.3g GiB, %d to compute", len(shapes), size_gib, len(missing))
        ranks.wait()  # until all have looked at what is missing, so that each takes its share of the same list
        mine = [pictures[name] for name in missing[ranks.rank :: ranks.count]]
        normalise = Normalisation(self._loaded.processor.image_processor)  # pyright: ignore[reportAttributeAccessIssue]
        for part, patches_PD in _decoded(mine, num_workers):
            pixel_values = normalise(patches_PD.to(self._loaded.device))
            self._files.write(part.sha256, self._compute(part, pixel_values))
        ranks.wait()

    @torch.no_grad()
    def _compute(self, part: ImagePart, pixel_values: Tensor) -> Tensor:
        device, dtype = self._loaded.device, self._loaded.dtype
        grid_I3 = torch.tensor([patch_grid(part.width, part.height, self._pixels)], device=device)
        body: Any = base_of(self._loaded.model).base_model
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return torch.cat(body.get_image_features(pixel_values, grid_I3).pooler_output)

    def _features(self, part: ImagePart, row_id: str) -> Tensor:
        found_MH = self._files.read(part.sha256, self._shape(part))
        if found_MH is None:
            raise ConfigError(
                f"row {row_id}: the features of image {part.image} have gone from {self._files.directory} since the "
                "training began: start it again, and leave that directory alone meanwhile",
                param="train.vision_cache.directory",
            )
        return found_MH

    def _shape(self, part: ImagePart) -> tuple[int, int]:
        return num_visual_tokens(part.width, part.height, self._pixels), self._hidden_size


def _check(loaded: LoadedModel, config: TrainConfig) -> None:
    if not loaded.is_vision:
        raise ConfigError(f"{config.model} has no vision tower: leave vision_cache out", param="train.vision_cache")
    if any(parameter.requires_grad for parameter in _tower(loaded).parameters()):
        raise ConfigError("vision_cache needs a vision tower that is not trained", param="train.vision_cache")
    if not takes_features(base_of(loaded.model)):
        raise ConfigError(
            f"transformers {version('transformers')} takes no precomputed features (mm_encoder_outputs): leave "
            "vision_cache out, or install a newer one",
            param="train.vision_cache",
        )


def _tower(loaded: LoadedModel) -> nn.Module:
    body: Any = base_of(loaded.model).base_model
    return body.visual


def _settings(loaded: LoadedModel, config: TrainConfig) -> dict[str, Any]:
    processor: Any = loaded.processor.image_processor  # pyright: ignore[reportAttributeAccessIssue]
    digest = hashlib.sha256()
    for name, weight in sorted(_tower(loaded).state_dict().items()):
        numbers = weight.detach().to(loaded.dtype).cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(numbers)
    return config.pixels.model_dump() | {
        "what": "vision features",
        "tower": base_of(loaded.model).config.vision_config.to_dict(),
        "weights": digest.hexdigest(),
        "normalised": [processor.rescale_factor, list(processor.image_mean), list(processor.image_std)],
        "device": torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu",
        "backend": IMAGE_BACKEND,
        "versions": [version("torch"), version("transformers")],
    }


class _Pictures(Dataset[Any]):
    def __init__(self, pictures: list[Picture]) -> None:
        self._pictures = pictures

    def __getitem__(self, place: int) -> tuple[int, Tensor | VlmDftError]:
        try:
            return place, self._pictures[place].patches()
        except VlmDftError as error:
            # Returned, because a loader process would re-raise it as another exception.
            return place, error


def _decoded(pictures: list[Picture], num_workers: int) -> Iterator[tuple[ImagePart, Tensor]]:
    loader = DataLoader(
        _Pictures(pictures),
        batch_size=None,
        sampler=range(len(pictures)),  # pyright: ignore[reportArgumentType]  (any iterable will do)
        num_workers=num_workers,
        worker_init_fn=start_loader_process if num_workers else None,
    )
    for place, patches_PD in loader:
        if isinstance(patches_PD, VlmDftError):
            raise patches_PD
        yield pictures[place].part, patches_PD
