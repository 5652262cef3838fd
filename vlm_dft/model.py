"""Load, freeze and adapt the models we train: Qwen2.5-VL, and Qwen2 / Qwen2.5 and Llama for text.

Only transformers' own classes, only safetensors, never code from a model directory. A model whose weights do not fit
its architecture exactly is refused: transformers alone would fill the gaps with random numbers.

Knows nothing about data, objectives or optimizers.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLProcessor,
)
from transformers.utils.import_utils import is_bitsandbytes_available

from vlm_dft.config import FreezeConfig, FullConfig, LoraConfig
from vlm_dft.data.canonical import Message, Row, TextPart
from vlm_dft.data.template import ChatTemplate
from vlm_dft.errors import ConfigError, ModelError, OutOfMemoryError
from vlm_dft.model_files import ADAPTER_CONFIG, ARCHITECTURES, ModelFiles, adapter_base, inspect, locate, read_json

Processor = Qwen2_5_VLProcessor | PreTrainedTokenizerBase
Precision = Literal["auto", "bf16", "fp32"]
Quantization = Literal["nf4"]

_DECODER_LINEARS = r"\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
LORA_TARGETS = {
    "language": rf"model\.(language_model\.)?layers\.\d+{_DECODER_LINEARS}",
    "all": rf"model\.(language_model\.)?layers\.\d+{_DECODER_LINEARS}"
    r"|model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))"
    r"|model\.visual\.merger\.mlp\.[02]",
}
"""Full names of the linear layers that get an adapter; the tied embedding and head never do."""

transformers.utils.logging.disable_progress_bar()  # carriage returns make a log file unreadable


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for forward passes, with what others need to know about it."""

    model: PreTrainedModel | PeftModel
    processor: Processor
    """A Qwen2_5_VLProcessor for vision models, the tokenizer for text models."""
    is_vision: bool
    device: torch.device
    dtype: torch.dtype
    """Of computation: weights have it too, unless they were loaded as fp32 master weights to train under autocast."""
    source: str
    quantization: Quantization | None = None
    """How the frozen weights are kept while adapters are trained; exports have the full ones."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.processor)

    @property
    def pad_token_id(self) -> int:
        """What fills a batch; masked wherever it is used."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self.end_of_turn_token_id

    @cached_property
    def end_of_turn_token_id(self) -> int:
        """The token with which the chat template closes an assistant turn."""
        turns = [Message(role=role, content=(TextPart(text="a"),)) for role in ("user", "assistant")]
        rendered = ChatTemplate.of(self.processor).render(Row(id="probe", messages=tuple(turns)))
        supervised = [
            token for token, is_label in zip(rendered.input_ids, rendered.supervised, strict=True) if is_label
        ]
        return supervised[-1]

    @property
    def image_token_id(self) -> int | None:
        """None for text models."""
        return self.model.config.image_token_id if self.is_vision else None


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
    master_weights: bool = False,
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Load a model directory, an adapter directory (base with adapter), or a hub id at a pinned revision.

    master_weights: keep the weights in fp32 whatever the precision, to train them under autocast; bf16 weights lose
    updates smaller than 1/256 of a weight. quantization: keep the language model's weights in 4 bits, to train adapters
    beside them. Raises ModelError, ConfigError (precision, device, quantization), OutOfMemoryError.
    """
    target = choose_device(device)
    dtype = choose_dtype(precision, target)
    quantized = _quantized(quantization, dtype, target)
    path = locate(str(source), revision)
    weights_dtype = torch.float32 if master_weights else dtype
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    files = inspect(locate(*adapter_base(path)) if is_adapter else path)
    model: PreTrainedModel | PeftModel = _load_weights(files, weights_dtype, quantized)
    if is_adapter:
        model = _load_adapter(model, path)
    with_processor = path if (path / "tokenizer_config.json").is_file() else files.path
    processor = load_processor(with_processor, vision=files.is_vision)
    _check_vocabulary(model, processor, files.path)
    try:
        model = model.to(target)  # pyright: ignore[reportArgumentType]  (torch's stub)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(f"the model {source} does not fit into the memory of {target}") from None
    return LoadedModel(model.eval(), processor, files.is_vision, target, dtype, str(source), quantization)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The given device, else the first GPU, else the CPU. Raises ConfigError for a device that is not there."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!s} cannot be used: {str(error).splitlines()[0]}", param="device") from None


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU that has it, fp32 elsewhere. Raises ConfigError for bf16 on a GPU without it."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        return torch.bfloat16 if capable else torch.float32
    if precision == "bf16" and device.type == "cuda" and not capable:
        raise ConfigError("this GPU does not compute in bf16: set precision to fp32", param="precision")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _quantized(quantization: Quantization | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained. Raises ConfigError where 4-bit weights cannot be had."""
    if quantization is None:
        return {}
    if device.type != "cuda":
        raise ConfigError(
            f"quantization {quantization} needs a CUDA device, and this is {device}: leave it out to train lora on "
            "weights in full precision",
            param="train.adapter.quantization",
        )
    if not is_bitsandbytes_available():
        raise ConfigError(
            f"quantization {quantization} needs bitsandbytes: pip install bitsandbytes, or leave it out",
            param="train.adapter.quantization",
        )
    # The tower and the head stay as they are: small beside the language model, and the first to suffer.
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _load_weights(files: ModelFiles, dtype: torch.dtype, quantized: dict[str, Any]) -> PreTrainedModel:
    model_class = getattr(transformers, ARCHITECTURES[files.model_type])
    try:
        model, info = model_class.from_pretrained(
            files.path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantized,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{files.path} cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info[problem]):
            raise ModelError(
                f"the weights in {files.path} do not fit its config.json: {len(names)} {problem.replace('_', ' ')}, "
                f"first {names[0]}"
            )
    return model


def _load_adapter(base: PreTrainedModel, path: Path) -> PeftModel:
    try:
        with _old_attribute_names():
            return PeftModel.from_pretrained(base, str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter {path} cannot be loaded: {_first_line(error)}") from error


def load_processor(path: Path, *, vision: bool) -> Processor:
    """Processor (vision) or tokenizer (text) of a model directory. Raises ModelError."""
    auto: Any = AutoProcessor if vision else AutoTokenizer
    try:
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the processor in {path} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    return processor.tokenizer if isinstance(processor, Qwen2_5_VLProcessor) else processor


def _check_vocabulary(model: PreTrainedModel | PeftModel, processor: Processor, path: Path) -> None:
    rows = language_head(model).weight.shape[0]
    tokens = len(tokenizer_of(processor))
    if tokens > rows:
        raise ModelError(f"the tokenizer in {path} has {tokens} tokens, the model's embedding only {rows}")


def set_use_cache(model: PreTrainedModel | PeftModel, use_cache: bool) -> None:
    """Key-value cache on (generation) or off (training).

    On the text config too, which transformers' trainer forgets: with the cache on, packed samples see each other.
    """
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = use_cache


def adapt(
    model: PreTrainedModel, adapter: FullConfig | LoraConfig, freeze_config: FreezeConfig, seed: int
) -> PreTrainedModel | PeftModel:
    """Make exactly the asked-for parameters trainable. Raises ConfigError for a contradiction."""
    if isinstance(adapter, FullConfig):
        freeze(model, freeze_config)
        return model
    if freeze_config != FreezeConfig():
        raise ConfigError(
            "freeze applies to full fine-tuning; with lora only the adapters are trained: choose adapter.targets",
            param="freeze",
        )
    return add_lora(model, adapter, seed)


def part_of(name: str) -> Literal["vision_tower", "merger", "language_model"]:
    """Which part of the model a parameter of this name belongs to, adapters included; FreezeConfig has the same."""
    if "visual.merger." in name:
        return "merger"
    return "vision_tower" if "visual." in name else "language_model"


def freeze(model: PreTrainedModel, config: FreezeConfig) -> None:
    """Set requires_grad of every parameter. Raises ConfigError when nothing is left to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not getattr(config, part_of(name)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("every part of the model is frozen: nothing is left to train", param="freeze")


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Wrap model with fresh adapters, the same for the same seed; all else is frozen. They change nothing yet."""
    settings = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=LORA_TARGETS[config.targets],
        task_type="CAUSAL_LM",
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _old_attribute_names():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


@contextmanager
def _old_attribute_names() -> Iterator[None]:
    """peft 0.21 asks a model for is_gradient_checkpointing, which transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, without its peft wrapper."""
    if not isinstance(model, PeftModel):
        return model
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def language_head(model: PreTrainedModel | PeftModel) -> nn.Linear:
    """The linear layer from hidden states to logits."""
    head = base_of(model).get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def save_model(
    model: PreTrainedModel, processor: Processor, directory: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write what from_pretrained loads: weights (state_dict's when given), config, processor, chat template."""
    model.save_pretrained(directory, state_dict=state_dict)
    save_processor(processor, directory)
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read


def save_processor(processor: Processor, directory: Path) -> None:
    """Write processor (or tokenizer), chat template, and preprocessor_config.json, which older stacks read."""
    processor.save_pretrained(directory)
    if isinstance(processor, Qwen2_5_VLProcessor):
        processor.image_processor.save_pretrained(directory)
    # How this process loaded the tokenizer is not part of the tokenizer, though transformers writes it down.
    path = directory / "tokenizer_config.json"
    config = {key: value for key, value in read_json(path).items() if key not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
