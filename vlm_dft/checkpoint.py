"""Checkpoints of a training: written whole or not at all, resumed from only when they belong to the same training.

    step-000040/
    ├── model.safetensors or adapter_model.safetensors, config, processor    what vlm_dft.model.load takes
    ├── training/optimizer.pt     optimizer and schedule
    ├── training/state.json       State: counters, configuration, fingerprint of the data
    ├── best/                     weights of an earlier step, where the accuracy probe found that one better
    └── complete.json             step, metrics, the other files' sizes; the directory is renamed into place with it

Random numbers need no file: each step draws from a generator seeded by run seed and step (``vlm_dft.trainer``).
Knows nothing about steps or losses.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm_dft.config import TrainConfig
from vlm_dft.errors import CheckpointError, DiskFullError
from vlm_dft.model import LoadedModel, save_model, save_processor
from vlm_dft.model_files import ADAPTER_WEIGHTS
from vlm_dft.results import AccuracyPoint, Record
from vlm_dft.run_dir import CHECKPOINT_MARKER, Checkpoint, RunDir, directory_in_place, write_json

log = logging.getLogger(__name__)

STATE_NAME: Final = "training/state.json"
OPTIMIZER_NAME: Final = "training/optimizer.pt"
BEST_NAME: Final = "best"

# What may differ between attempts of one training: places, how often to write, and what changes only memory and speed.
_MAY_DIFFER: Final = frozenset(
    {"resume_from", "dataset", "validation_dataset", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps"}
    | {"probe_rows", "probe_every_steps", "sample_rows", "sample_max_new_tokens"}
    | {"micro_batch_size", "packing", "pack_length_tokens", "gradient_checkpointing"}
    | {"patch_cache", "vision_cache", "reference_cache", "compile"}
)
# What lies elsewhere on another host; the model is told by its fingerprint.
_PLACES: Final = frozenset({"model", "accuracy_probe.benchmark.path"})


class State(Record):
    """Where a training stands; counters cover all its attempts."""

    step: int = 0
    """Optimizer steps done."""
    trained_tokens: int = 0
    input_tokens: int = 0
    num_samples: int = 0
    first_nll: float = 0.0
    last_nll: float = 0.0
    valid_nll_before: float | None = None
    valid_nll: float | None = None
    """The latest one."""
    valid_step: int | None = None
    """When it was measured."""
    accuracies: tuple[AccuracyPoint, ...] = ()
    """What the accuracy probe has measured so far, which decides whether to go on."""
    best_step: int | None = None
    """When the best of them was measured, whose weights will be exported; None: the last ones will."""
    best_valid_nll: float | None = None
    """Measured then."""
    config: dict[str, Any]
    """The settings that must be the same when it goes on."""
    fingerprint: str
    """Of the training data."""
    model: str | None = None
    """Of the model that the training began with (``model_files.model_fingerprint``); None: an older version's."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is trained."""
    return config.model_dump(mode="json", exclude=set(_MAY_DIFFER))


_DEFAULTS: Final = identity(TrainConfig(model="", dataset=Path()))
"""What a setting is that is younger than a checkpoint."""


def config_sha256(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save(
    run: RunDir,
    loaded: LoadedModel,
    training: dict[str, Any],
    state: State,
    metrics: dict[str, float],
    weights: dict[str, torch.Tensor] | None = None,
    best: Path | None = None,
) -> Path:
    """Write a checkpoint in a temporary directory and rename it into place.

    training: state_dicts for optimizer.pt. weights: the model's state_dict, where the model itself holds parts of it.
    best: where the weights of state.best_step are. A checkpoint has its own copy, by links that take no room, so that
    pruning an older one, or going on elsewhere, loses nothing.
    """
    target = run.checkpoint_path(state.step)
    with directory_in_place(target) as directory:
        (directory / STATE_NAME).parent.mkdir()
        with _disk_full_by_name(target):
            _save_weights(loaded, directory, weights)
            with (directory / OPTIMIZER_NAME).open("wb") as file:
                torch.save(training, file)
            if best is not None and state.best_step != state.step:
                _link_model(best, directory / BEST_NAME)
        write_json(directory / STATE_NAME, state)
        sizes = {str(file.relative_to(directory)): file.stat().st_size for file in _files(directory)}
        marker = {"step": state.step, "metrics": metrics, "config_sha256": config_sha256(state.config), "files": sizes}
        write_json(directory / CHECKPOINT_MARKER, marker)
    log.info("checkpoint %s", target)
    return target


def best_weights(path: Path, state: State) -> Path | None:
    """Where a checkpoint of this state has the best weights; None: there are no better ones than the last."""
    if state.best_step is None:
        return None
    return path if state.best_step == state.step else path / BEST_NAME


def _link_model(source: Path, target: Path) -> None:
    """A checkpoint's model without its training: files are never written twice, so that links are as good as copies."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != CHECKPOINT_MARKER:
            try:
                (target / file.name).hardlink_to(file)
            except OSError:  # another disk, or one that has no links
                shutil.copyfile(file, target / file.name)


@contextmanager
def _disk_full_by_name(target: Path) -> Iterator[None]:
    """safetensors and torch report a full disk as errors of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        cause = error.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise DiskFullError(f"no space left while writing {target}: free space on its disk and resume") from error
        raise


def _save_weights(loaded: LoadedModel, directory: Path, weights: dict[str, torch.Tensor] | None) -> None:
    if isinstance(loaded.model, PeftModel):
        # Without "False", peft asks the hub whether the vocabulary was resized.
        loaded.model.save_pretrained(str(directory), save_embedding_layers=False, state_dict=weights)
        save_processor(loaded.processor, directory)
    else:
        save_model(loaded.model, loaded.processor, directory, weights)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def open_checkpoint(path: Path, config: TrainConfig, fingerprint: str, model: str) -> State:
    """State of a complete checkpoint of the same training. fingerprint, model: of its data and of its base model.

    Raises CheckpointError: for a torn one naming the file, for one of another training naming the fields that differ.
    """
    _check_whole(path)
    try:
        state = State.model_validate_json((path / STATE_NAME).read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path / STATE_NAME} cannot be read: {error.errors()[0]['msg']}") from None
    found, wanted = _flat(state.config), _flat(identity(config))
    found = {name: value for name, value in _flat(_DEFAULTS).items() if name in wanted} | found
    differing = [
        f"{name} is {wanted.get(name)!r}, the checkpoint has {found.get(name)!r}"
        for name in sorted((found.keys() | wanted.keys()) - _PLACES)
        if found.get(name) != wanted.get(name)
    ]
    if state.model not in (model, None):
        differing.append(f"model {config.model} has fingerprint {model[:12]}, the checkpoint's had {state.model[:12]}")
    if state.fingerprint != fingerprint:
        differing.append(f"dataset has fingerprint {fingerprint[:12]}, the checkpoint's had {state.fingerprint[:12]}")
    if differing:
        raise CheckpointError(
            f"{path} was written by another training: {'; '.join(differing)}. Start anew, or restore these settings",
            param="train.resume_from",
        )
    return state


def _check_whole(path: Path) -> None:
    try:
        sizes = json.loads((path / CHECKPOINT_MARKER).read_bytes())["files"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {CHECKPOINT_MARKER} is missing", param="train.resume_from"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path / CHECKPOINT_MARKER} cannot be read", param="train.resume_from") from None
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{path} is torn: {name} {what}", param="train.resume_from")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def load_adapter(path: Path, model: PeftModel) -> None:
    """Put a checkpoint's adapter weights into a model that has fresh adapters of the same shape."""
    result = set_peft_model_state_dict(model, load_file(path / ADAPTER_WEIGHTS))
    if result.unexpected_keys:
        raise CheckpointError(f"the adapter in {path} does not fit the model: {result.unexpected_keys[0]} has no place")


def load_training(path: Path) -> dict[str, Any]:
    """What save was given as training."""
    return torch.load(path / OPTIMIZER_NAME, weights_only=True, map_location="cpu")


def prune(run: RunDir, keep: int) -> None:
    """Remove all but the newest complete checkpoints."""
    for checkpoint in run.complete_checkpoints()[:-keep]:
        _remove(checkpoint)


def _remove(checkpoint: Checkpoint) -> None:
    # Renamed first: a reader never finds a marker in a directory that is being emptied.
    doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
    checkpoint.path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(run: RunDir) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for pattern in (".step-*.tmp", ".step-*.removed"):
        for path in run.checkpoints_path.glob(pattern):
            shutil.rmtree(path)
