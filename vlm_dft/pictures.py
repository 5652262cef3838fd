"""Where a training's pictures come from: image files, decoded at every use, or the cache that the config names.

Knows nothing about how a cache makes what it keeps (``data.patch_cache``, ``vision_cache``).
"""

from __future__ import annotations

import dataclasses
import logging

from vlm_dft.batches import Corpus, Plan, num_loader_workers
from vlm_dft.config import TrainConfig
from vlm_dft.data.patch_cache import PatchCache
from vlm_dft.model import LoadedModel
from vlm_dft.ranks import Ranks
from vlm_dft.vision_cache import Picture, VisionCache

log = logging.getLogger(__name__)


class Pictures:
    """Those of one training, of its training rows and its held-out ones."""

    def __init__(self, loaded: LoadedModel, config: TrainConfig, ranks: Ranks) -> None:
        """loaded.model has requires_grad set. Raises ConfigError for a cache that cannot serve."""
        self._config = config
        self._ranks = ranks
        self._features = VisionCache(loaded, config) if config.vision_cache is not None else None

    def of(self, corpus: Corpus) -> Corpus:
        """The corpus, its samples getting their pictures from the cache if there is one."""
        if self._features is not None:
            return dataclasses.replace(corpus, pictures=self._features)
        if self._config.patch_cache is not None:
            cache = PatchCache(self._config.patch_cache, corpus.encoder, corpus.dataset)
            return dataclasses.replace(corpus, pictures=cache)
        return corpus

    def prepare(self, *used: tuple[Corpus, Plan]) -> None:
        """Before the first step, with the model's weights in their final types: check the budget, compute features.

        Raises ConfigError and DiskFullError when the cache has no room, DatasetError for a picture that has changed.
        """
        for corpus, plan in used:
            if isinstance(corpus.pictures, PatchCache):
                rows = [corpus.rows[index] for index in plan.used()]
                missing = corpus.pictures.reserve(part for row in rows for part in row.images)
                log.info("%d images of %s are not decoded yet", missing, corpus.dataset.path)
        if self._features is not None:
            wanted: dict[str, Picture] = {}
            for corpus, plan in used:
                for row in (corpus.rows[index] for index in plan.used()):
                    for part in row.images:
                        wanted.setdefault(part.sha256, Picture(part, corpus.encoder, corpus.dataset, row.id))
            self._features.build(wanted, self._ranks, num_loader_workers(self._ranks.device, self._ranks.count))
