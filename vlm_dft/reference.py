"""The base model beside the one that is trained, for objectives that compare the two.

iw_sft and psft ask how probable a target was to the base model: that never changes, so it is computed once, before the
first step, and stored in the run directory, or in one that runs share. asft asks for the base model's whole
distribution: that is not storable, so the model stays in memory and sees what the trained one sees, pictures included.
With LoRA the base model is the trained one with its adapters switched off, and costs nothing.
Knows nothing about objectives' formulas.

Shapes: N positions, M supervised ones, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vlm_dft.batches import MicroBatch, Steps
from vlm_dft.config import TrainConfig
from vlm_dft.data import cache_room
from vlm_dft.forward import Forward
from vlm_dft.head import IGNORED, objective_loss
from vlm_dft.model import LoadedModel, load
from vlm_dft.model_files import locate, model_sha256
from vlm_dft.ranks import Ranks
from vlm_dft.run_dir import RunDir, write_atomically

log = logging.getLogger(__name__)

_DIRECTORY_NAME: Final = "reference"


class Reference:
    """The base model of one training."""

    def __init__(self, trained: LoadedModel, config: TrainConfig) -> None:
        """trained: as the training has it. Raises what load raises."""
        self._adapted = trained.model if isinstance(trained.model, PeftModel) else None
        if self._adapted is not None:
            self._loaded = trained
        else:
            precision = "bf16" if trained.dtype == torch.bfloat16 else "fp32"
            self._loaded = load(config.model, revision=config.revision, precision=precision, device=trained.device)
            self._loaded.model.requires_grad_(False)
        self._forward = Forward(self._loaded, packing=config.packing)

    @property
    def head(self) -> nn.Linear:
        return self._forward.head

    @torch.no_grad()
    def hidden_ND(self, micro_batch: MicroBatch) -> Tensor:  # noqa: N802  shapes are suffixes
        """What the base model's head is given for the same inputs."""
        with self._adapted.disable_adapter() if self._adapted is not None else nullcontext():
            return self._forward(micro_batch)

    def target_logp(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Log-probabilities of each row's targets, by row id, float32 on the CPU."""
        labels_N = micro_batch.labels_BT.flatten()
        hidden_ND = self.hidden_ND(micro_batch)
        with torch.no_grad():
            sums = objective_loss(
                hidden_ND,
                self.head.weight,
                labels_N.to(hidden_ND.device),
                objective="nll",
                bias_V=self.head.bias,
                statistics="target",
            )
        counts = micro_batch.segments_N[labels_N != IGNORED].bincount(minlength=len(micro_batch.row_ids)).tolist()
        return dict(zip(micro_batch.row_ids, sums.logp_M.float().cpu().split(counts), strict=True))


class StoredLogp:
    """Row id -> its targets' log-probabilities under the base model, in a file."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """settings: what the numbers depend on; a file that was made with others is not used."""
        self._settings = json.dumps(settings, sort_keys=True)
        self._rows: dict[str, Tensor] = {}

    def __getitem__(self, row_id: str) -> Tensor:
        return self._rows[row_id]

    @property
    def name(self) -> str:
        """Of the file: other settings are another file."""
        return hashlib.sha256(self._settings.encode()).hexdigest()[:32] + ".safetensors"

    def read(self, path: Path) -> bool:
        """Take what a run has stored at path; False when there is nothing that would do."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("settings") != self._settings:
                    return False
                counts = json.loads(metadata["rows"])
                self._rows = dict(zip(counts, file.get_tensor("logp").split(list(counts.values())), strict=True))
        except (OSError, SafetensorError):
            return False
        return True

    def compute(self, reference: Reference, steps: Iterable[list[MicroBatch]], ranks: Ranks) -> None:
        """This rank's share of all rows, then everyone's."""
        mine: dict[str, Tensor] = {}
        for micro_batches in steps:
            for micro_batch in micro_batches:
                mine |= reference.target_logp(micro_batch)
        self._rows = {row_id: logp for share in ranks.gather(mine) for row_id, logp in share.items()}

    def write(self, path: Path) -> None:
        """Raises DiskFullError."""
        counts = {row_id: logp.numel() for row_id, logp in self._rows.items()}
        metadata = {"settings": self._settings, "rows": json.dumps(counts)}
        logp = torch.cat(list(self._rows.values())) if self._rows else torch.zeros(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"logp": logp}, metadata))
        log.info("log-probabilities of %d targets under the base model: %s", logp.numel(), path)


def attach_target_logp(
    used: Sequence[Steps], trained: LoadedModel, config: TrainConfig, run: RunDir, ranks: Ranks
) -> None:
    """Give the rows of used what the base model makes of their targets: stored by an earlier run, or computed now.

    Raises DiskFullError, and what load and a row's encoding raise.
    """
    reference = None
    weights = model_sha256(locate(config.model, config.revision))
    for steps in used:
        rows = steps.plan.used()
        stored = StoredLogp(_settings(config, trained, weights, steps.corpus.dataset.manifest.fingerprint, rows))
        own, *others = (directory / stored.name for directory in _directories(config, run))
        is_here = stored.read(own)
        if not ranks.all(is_here or any(map(stored.read, others))):
            reference = reference or Reference(trained, config)
            stored.compute(reference, steps.once(rows).read(), ranks)
        if ranks.is_first:
            if not is_here:
                stored.write(own)
            if config.reference_cache is not None:
                cache_room.hold(own.parent, [own], needed_bytes=0, budget_bytes=config.reference_cache.max_gib * 2**30)
        steps.ref_logp = stored


def _directories(config: TrainConfig, run: RunDir) -> Iterator[Path]:
    """Where they may be, that of this run first."""
    yield config.reference_cache.directory if config.reference_cache is not None else run.path / _DIRECTORY_NAME
    if config.resume_from is not None:
        # A checkpoint lies two levels below the run directory of the attempt that wrote it.
        yield config.resume_from.parent.parent / _DIRECTORY_NAME


def _settings(
    config: TrainConfig, trained: LoadedModel, weights: str, fingerprint: str, rows: Sequence[int]
) -> dict[str, Any]:
    return {
        "weights": weights,
        "quantization": trained.quantization,
        "dtype": str(trained.dtype),
        "pixels": config.pixels.model_dump(),
        "dataset": fingerprint,
        "rows": hashlib.sha256(repr(list(rows)).encode()).hexdigest(),
    }
