"""Load the tokenizer and chat template of a model directory, without its weights. The only use of transformers here.

Apart from ``tokens``, because the API imports that one and may not reach transformers by any way.
"""

from __future__ import annotations

from pathlib import Path

from vlm_dft.data.template import ChatTemplate
from vlm_dft.data.tokens import chat_template, read_json, tokenizer_sha256
from vlm_dft.errors import ModelError

VISION_MODELS = frozenset({"qwen2_5_vl"})
"""model_type of config.json: models whose template takes pictures."""


def load_template(model_dir: str) -> ChatTemplate:
    """The same template and tokenizer that training gets from the model's processor. Raises ModelError."""
    from transformers import AutoTokenizer

    path = Path(model_dir)
    tokenizer_sha256(path)  # without a vocabulary transformers would make an empty tokenizer
    vision = read_json(path / "config.json").get("model_type") in VISION_MODELS
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    source = chat_template(path) or tokenizer.chat_template
    image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"  # as transformers' own processor chooses
    return ChatTemplate.checked(tokenizer, source, vision=vision, image_token=image_token if vision else None)
