"""Write a trained model as a directory that plain transformers loads, and prove it before it appears.

    TARGET/
    ├── model*.safetensors, config.json, generation_config.json     adapters merged into the weights
    ├── tokenizer*, chat_template.jinja, processor_config.json, preprocessor_config.json
    └── adapter/        for LoRA: the adapter alone, adapter_config.json and adapter_model.safetensors

The proof: the written directory is reloaded with `from_pretrained` and answers fixed prompts, one of them with a
picture for vision models; its logits must be the trained model's. Nothing of a failed export is kept.

Knows nothing about runs or checkpoints.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from PIL import Image
from torch import Tensor

from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import ImagePart, Message, TextPart
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.errors import DiskFullError, ExportError, ModelError, OutOfMemoryError
from vlm_dft.model import LoadedModel, base_of, load, save_model, set_use_cache
from vlm_dft.model_files import model_sha256
from vlm_dft.run_dir import directory_in_place

ADAPTER_NAME = "adapter"

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest allowed |difference| / |logits| (Euclidean) by the precision of the exported weights: rounding, no more."""

PROMPTS = ("What is 12 + 30?", "How many shapes are in the picture? Think step by step.")


@dataclass(frozen=True)
class ExportRecord:
    """A finished export."""

    path: Path
    adapter: Path | None
    """For LoRA."""
    model_sha256: str
    """Hash of the merged weights (``model_files.model_sha256``)."""
    logit_difference: float
    """Largest relative difference over the fixed prompts, before and after."""


def export(loaded: LoadedModel, target: Path) -> ExportRecord:
    """Write loaded's model to target, replacing it, in loaded.dtype; the model itself is not changed.

    Adapters that were trained beside 4-bit weights are merged into the full ones, and compared as such. Raises
    ExportError when the reloaded model differs from the trained one, DiskFullError.
    """
    if loaded.quantization is not None:
        loaded = _in_full_precision(loaded)
    with directory_in_place(target) as directory:
        with _disk_full_by_name(target), _generating(loaded):
            save_model(base_of(loaded.model), loaded.processor, directory, merged_state_dict(loaded))
            if isinstance(loaded.model, PeftModel):
                # Without "False", peft asks the hub whether the vocabulary was resized.
                loaded.model.save_pretrained(str(directory / ADAPTER_NAME), save_embedding_layers=False)
                (directory / ADAPTER_NAME / "README.md").unlink()  # peft's empty model card
            _state_dtype(directory / "config.json", loaded.dtype)
        difference = _verified_difference(loaded, directory)
        digest = model_sha256(directory)
    adapter = target / ADAPTER_NAME if isinstance(loaded.model, PeftModel) else None
    return ExportRecord(target, adapter, digest, difference)


def _in_full_precision(loaded: LoadedModel) -> LoadedModel:
    """The trained adapters on the base model's own weights."""
    assert isinstance(loaded.model, PeftModel), "only adapters are trained beside quantized weights"
    precision = "bf16" if loaded.dtype == torch.bfloat16 else "fp32"
    with tempfile.TemporaryDirectory() as directory:
        loaded.model.save_pretrained(directory, save_embedding_layers=False)
        return load(directory, precision=precision, device=loaded.device)


def merged_state_dict(loaded: LoadedModel) -> dict[str, Tensor]:
    """Weights by the names of the base model, adapters added to the layers they adapt, in loaded.dtype.

    The model stays as it is: peft's own merge changes it in place, and taking it back does not restore every bit.
    """
    base = base_of(loaded.model)
    merged: dict[str, Tensor] = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in base.state_dict(keep_vars=True).items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, LoraLinear):
                deltas = [module.get_delta_weight(adapter).float() for adapter in module.active_adapters]
                merged[f"{name}.weight"] = sum(deltas, start=merged[f"{name}.weight"].float())
    # Tied weights are one parameter under two names, and are written as one only while they stay one tensor.
    converted = {id(tensor): tensor.detach().to(loaded.dtype) for tensor in merged.values()}
    return {name: converted[id(tensor)] for name, tensor in merged.items()}


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """Name the exported weights' precision in config.json: transformers has written that of the model in memory."""
    config = json.loads(path.read_bytes())
    for section in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def _generating(loaded: LoadedModel) -> Iterator[None]:
    """The config as users of the export want it: training had switched the cache off."""
    before = base_of(loaded.model).config.get_text_config().use_cache
    set_use_cache(loaded.model, True)
    try:
        yield
    finally:
        set_use_cache(loaded.model, before)


@contextmanager
def _disk_full_by_name(target: Path) -> Iterator[None]:
    """safetensors and tokenizers report a full disk as errors of their own, told apart only by their text."""
    try:
        yield
    except Exception as error:
        if any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise DiskFullError(f"no space left while writing {target}: free space and try again") from error
        raise


def _verified_difference(loaded: LoadedModel, directory: Path) -> float:
    precision = "bf16" if loaded.dtype == torch.bfloat16 else "fp32"
    try:
        reloaded = load(directory, precision=precision, device=loaded.device)
    except ModelError as error:
        raise ExportError(f"the exported model cannot be loaded: {error.message}") from error
    largest = 0.0
    for trained, exported in zip(_prompts(loaded), _prompts(reloaded), strict=True):
        if not torch.equal(trained.input_ids_T, exported.input_ids_T):
            raise ExportError(f"the exported tokenizer or chat template encodes {trained.row_id!r} differently")
        expected_TV, found_TV = _logits(loaded, trained), _logits(reloaded, exported)
        largest = max(largest, float((found_TV - expected_TV).norm() / expected_TV.norm()))
        if not torch.isfinite(found_TV).all():
            raise ExportError("the exported model computes values that are not finite")
    if largest > TOLERANCE[loaded.dtype]:
        raise ExportError(
            f"the exported model's logits differ from the trained model's by {largest:.2e}, relative; "
            f"at most {TOLERANCE[loaded.dtype]:.0e} is rounding"
        )
    return largest


def _prompts(loaded: LoadedModel) -> list[Sample]:
    encoder = Encoder(loaded.processor, PixelConfig())
    samples = []
    for text in PROMPTS:
        images = [Image.linear_gradient("L").convert("RGB")] if loaded.is_vision and samples else []
        parts = [ImagePart(image="", sha256="", width=image.width, height=image.height) for image in images]
        message = Message(role="user", content=(*parts, TextPart(text=text)))
        samples.append(encoder.encode_prompt([message], images, row_id=text))
    return samples


def _logits(loaded: LoadedModel, sample: Sample) -> Tensor:
    """T x V in fp32, computed as in training: in loaded.dtype, under autocast where that is narrower than fp32."""
    batch = collate([sample], loaded.pad_token_id)
    batch.pop("labels")
    autocast = loaded.dtype != torch.float32
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad(), torch.autocast(loaded.device.type, loaded.dtype, enabled=autocast):
            inputs = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
            return loaded.model(**inputs, use_cache=False).logits[0].float()
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"{loaded.device} ran out of memory with the trained model and its export side by side, which the proof of "
            "an export needs: resume on a device with room for both; every checkpoint was kept"
        ) from None
    finally:
        loaded.model.train(training)
