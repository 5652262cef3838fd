"""What a model directory must hold before anything of it is loaded, and the hash of its weights. Torch-free.

Only data is ever read from a model directory: safetensors and JSON. Pickles and Python files are refused, not ignored.
Knows nothing about tensors; whether the weights fit the architecture shows when they are loaded (``vlm_dft.model``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dft.errors import DiskFullError, ModelError
from vlm_dft.run_dir import disk_errors

ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""model_type of config.json, and the one class it is loaded with."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_STRETCHES = 16
_STRETCH_BYTES = 2**16
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


@dataclass(frozen=True)
class ModelFiles:
    """A directory that can be loaded: weights complete, architecture supported."""

    path: Path
    model_type: str

    @property
    def is_vision(self) -> bool:
        return self.model_type == "qwen2_5_vl"


def locate(source: str, revision: str | None = None) -> Path:
    """Directory of source: itself, or a hub id's files at a pinned revision. Raises ModelError, DiskFullError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.count("/") != 1:
        raise ModelError(f"model {source!r} is neither a directory nor a hub id: check the name", param="model")
    if revision is None:
        raise ModelError(
            f"model {source!r} is no directory here; as a hub id it needs a revision, so that it cannot change between "
            "two runs: give the commit",
            param="revision",
        )
    import httpx
    from huggingface_hub import constants, snapshot_download

    try:
        with disk_errors(Path(constants.HF_HUB_CACHE)):
            return Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES))
    except DiskFullError:
        raise
    except (OSError, ValueError, httpx.HTTPError) as error:  # no such id or revision, no network, offline mode
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model {source!r} at {revision!r} cannot be fetched: {reason}", param="model") from None


def inspect(path: Path) -> ModelFiles:
    """Check config.json and the weight files of a full model. Raises ModelError naming what is missing or refused."""
    config = read_json(path / "config.json")
    if "auto_map" in config:
        raise ModelError(f"{path} asks to run code of its own (auto_map in config.json): such models are never loaded")
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelError(f"{path} is a {model_type!r} model; supported are {', '.join(ARCHITECTURES)}")
    expected = ARCHITECTURES[model_type]
    architectures = config.get("architectures") or [expected]
    if expected not in architectures:
        raise ModelError(f"{path} is a {architectures[0]}; of the type {model_type} only {expected} is supported")
    if "quantization_config" in config:
        raise ModelError(f"{path} is quantized, which cannot be trained here: use the unquantized model")
    weight_files(path)
    _check_tokenizer(path, vision=model_type == "qwen2_5_vl")
    return ModelFiles(path, model_type)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a full model, all present. Raises ModelError."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (path / name).is_file()]
        if missing or not shards:
            raise ModelError(
                f"{path} is incomplete: {missing[0] if missing else 'its index names no shard'} is missing"
            )
        return [path / name for name in shards]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if any(found for pattern in _PICKLES for found in path.glob(pattern)):
        raise ModelError(f"{path} holds its weights as pickles, which can run code: convert them to safetensors")
    raise ModelError(f"{path} holds no weights: model.safetensors is missing")


def model_sha256(path: Path) -> str:
    """Hash over names and contents of the weight files; of the adapter's and its base's for an adapter directory."""
    if (path / ADAPTER_CONFIG).is_file():
        base = locate(*adapter_base(path))
        parts = [f"{ADAPTER_WEIGHTS}:{file_sha256(path / ADAPTER_WEIGHTS)}", f"base:{model_sha256(base)}"]
    else:
        parts = [f"{file.name}:{file_sha256(file)}" for file in weight_files(path)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def model_fingerprint(path: Path) -> str:
    """Tells models apart in milliseconds, wherever they lie: by config and stretches of their weights. Proves nothing:
    that is model_sha256's."""
    if (path / ADAPTER_CONFIG).is_file():
        base = model_fingerprint(locate(*adapter_base(path)))
        return hashlib.sha256(f"{_stretches(path / ADAPTER_WEIGHTS)} {base}".encode()).hexdigest()
    parts = [config_sha256(path), *map(_stretches, weight_files(path))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stretches(path: Path) -> str:
    """Hash over name, size and a few places of a file."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for number in range(_STRETCHES):
            file.seek(max(0, size - _STRETCH_BYTES) * number // (_STRETCHES - 1))
            digest.update(file.read(_STRETCH_BYTES))
    return digest.hexdigest()


def config_sha256(model: Path) -> str:
    """Hash over the files of a model directory that decide what its weights compute and how text becomes tokens."""
    names = ("config.json", "adapter_config.json", "tokenizer.json", "vocab.json", "merges.txt")
    found = [f"{name}:{file_sha256(model / name)}" for name in names if (model / name).is_file()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def adapter_base(path: Path) -> tuple[str, str | None]:
    """(source, revision) of the model that an adapter directory belongs to. Raises ModelError."""
    config = read_json(path / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path / ADAPTER_CONFIG} does not say which base model it belongs to")
    if config.get("auto_mapping"):
        raise ModelError(f"{path / ADAPTER_CONFIG} asks to run code of its own (auto_mapping): it is never loaded")
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{path} is incomplete: {ADAPTER_WEIGHTS} is missing")
    return base, config.get("revision")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: {path.parent} is not a complete model directory") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


def _check_tokenizer(path: Path, *, vision: bool) -> None:
    def there(*names: str) -> bool:
        return all((path / name).is_file() for name in names)

    if not (there("tokenizer.json") or there("vocab.json", "merges.txt")):
        raise ModelError(f"{path} holds no tokenizer: tokenizer.json is missing")
    if vision and not (there("processor_config.json") or there("preprocessor_config.json")):
        raise ModelError(f"{path} holds no image processor: preprocessor_config.json is missing")
