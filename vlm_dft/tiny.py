"""Build small models of real architectures with random weights: `python -m vlm_dft.tiny OUT_DIR [--seed N]`.

A tiny Qwen2.5-VL (or Qwen2, Llama) is the transformers class itself with small dimensions, a byte-level BPE tokenizer
trained on a few texts (so any UTF-8 text can be written), the family's special tokens and chat template, and processor
files, saved so that `from_pretrained` loads the directory. With tokenizer_dir it takes a real tokenizer instead.

Knows nothing about training; what such a model can learn depends on the dimensions and texts that the caller chooses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vlm_dft.model import save_model
from vlm_dft.run_dir import directory_in_place

# In the order of the real vocabulary; <tool_call> and the fim tokens are ordinary text there, and absent here.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)

# Qwen2's rule for what a merge may not cross: contractions, words, single digits, punctuation, line breaks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BUILT_IN_TEXTS = (
    "You are a helpful assistant. Look at the picture and answer the question. Think step by step.",
    "<think>First I count the shapes. There are three red circles, two blue squares and one green triangle.</think>",
    "<think>The bar of A is 4 units long and the bar of B is 7 units long, so together they are 11 units.</think>",
    "<answer>The answer is 12</answer> <answer>A</answer> <answer>B</answer> <answer>C</answer> <answer>D</answer>",
    "How many circles are there in the image? Which of the colors appears most often? What is the missing number?",
    "Options: A. yellow B. orange C. purple D. black. Please choose the correct option, for example A, B, C or D.",
    "The pattern in the grid repeats: each row has the same sum, therefore the missing value must be equal to it.",
    "Let x be the length of the side. Then the area is x times x, because all sides of a square are equal.",
    "She sold half as many in May as in April. How many did she sell altogether in April and May? #### 72",
    "user assistant system question answer number total left right above below between each other than then",
)


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes of a tiny model; the vision ones are ignored by text models. Defaults: about 250 thousand parameters."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 1024
    """Largest vocabulary of the trained tokenizer, special tokens included; a real tokenizer decides by itself."""
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 192
    vision_layers: int = 2
    vision_heads: int = 4
    window_size: int = 112
    """Pixels; in all vision layers but the last, patches see only their window."""
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 16384 * 28 * 28

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) or self.vision_hidden_size % (4 * self.vision_heads):
            raise ValueError("hidden_size must divide by 2 x num_heads, vision_hidden_size by 4 x vision_heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide by num_kv_heads {self.num_kv_heads}")
        if self.window_size % 28:
            raise ValueError(f"window_size {self.window_size} must be a multiple of 28 pixels, a merged patch")

    @property
    def mrope_section(self) -> list[int]:
        """Rotary frequencies for time, height and width, in Qwen2.5-VL's proportion 2:3:3; they sum to half a head."""
        half = self.hidden_size // self.num_heads // 2
        spatial = half * 3 // 8
        return [half - 2 * spatial, spatial, spatial]


def build_tiny_vlm(
    out: Path | str,
    *,
    texts: Iterable[str] | None = None,
    tokenizer_dir: Path | str | None = None,
    seed: int = 0,
    **dims: Any,
) -> Path:
    """Write a random Qwen2.5-VL with processor to the directory out, replacing it; keywords are fields of Dims.

    texts: what its tokenizer is trained on (built-in sentences otherwise); or tokenizer_dir: a real tokenizer to take.
    """
    sizes = Dims(**dims)
    tokenizer = _load_tokenizer(tokenizer_dir) if tokenizer_dir else _train_qwen_tokenizer(texts, sizes.vocab_size)
    if tokenizer_dir is None:
        tokenizer.chat_template = _template("vision")
    config = _vlm_config(sizes, tokenizer, _vocab_size(tokenizer, tokenizer_dir))
    with _seeded(seed):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer, "<|im_end|>", "<|endoftext|>")
    limits: Any = {"min_pixels": sizes.min_pixels, "max_pixels": sizes.max_pixels}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=tokenizer.chat_template,
    )
    return _save(Path(out), model, processor)


def build_tiny_text(
    out: Path | str,
    family: Literal["qwen2", "llama"] = "qwen2",
    *,
    texts: Iterable[str] | None = None,
    tokenizer_dir: Path | str | None = None,
    seed: int = 0,
    **dims: Any,
) -> Path:
    """Write a random Qwen2 or Llama with tokenizer to the directory out, replacing it; see build_tiny_vlm."""
    sizes = Dims(**dims)
    if tokenizer_dir:
        tokenizer = _load_tokenizer(tokenizer_dir)
    elif family == "qwen2":
        tokenizer = _train_qwen_tokenizer(texts, sizes.vocab_size)
        tokenizer.chat_template = _template("text")
    else:
        tokenizer = _train_llama_tokenizer(texts, sizes.vocab_size)
        tokenizer.chat_template = _template("llama")
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    config = config_class(
        **_decoder_sizes(sizes),
        vocab_size=_vocab_size(tokenizer, tokenizer_dir),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=sizes.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    with _seeded(seed):
        model = model_class(config)
    model.generation_config = _generation_config(tokenizer, str(tokenizer.eos_token))
    return _save(Path(out), model, tokenizer)


def _decoder_sizes(sizes: Dims) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": sizes.max_position_embeddings,
        "initializer_range": sizes.initializer_range,
    }


def _vlm_config(sizes: Dims, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Qwen2_5_VLConfig:
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            **_decoder_sizes(sizes),
            "vocab_size": vocab_size,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": sizes.mrope_section,
                "rope_theta": 1_000_000.0,
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": sizes.vision_layers,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden_size,
            "window_size": sizes.window_size,
            "fullatt_block_indexes": [sizes.vision_layers - 1],
            "tokens_per_second": 2,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=sizes.tie_word_embeddings,
    )


def _train_bpe(texts: Iterable[str] | None, vocab_size: int) -> tuple[Tokenizer, dict[str, int], Any]:
    """A byte-level BPE over texts: all 256 bytes first, then merges up to vocab_size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(BUILT_IN_TEXTS if texts is None else texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    return tokenizer, trained["vocab"], [tuple(pair) for pair in trained["merges"]]


def _train_qwen_tokenizer(texts: Iterable[str] | None, vocab_size: int) -> PreTrainedTokenizerFast:
    _, vocab, merges = _train_bpe(texts, vocab_size - len(QWEN_SPECIAL_TOKENS))
    no_unknown: Any = None  # every byte has a token
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=no_unknown,
        eos_token="<|im_end|>",  # noqa: S106  (a vocabulary entry)
        pad_token="<|endoftext|>",  # noqa: S106
        extra_special_tokens=list(QWEN_SPECIAL_TOKENS),
        model_max_length=131072,
    )


def _train_llama_tokenizer(texts: Iterable[str] | None, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer, _, _ = _train_bpe(texts, vocab_size - len(LLAMA_SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",  # noqa: S106
        eos_token="<|eot_id|>",  # noqa: S106
        pad_token="<|pad|>",  # noqa: S106
        extra_special_tokens=list(LLAMA_SPECIAL_TOKENS),
        model_max_length=131072,
    )


def _load_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _vocab_size(tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path | str | None) -> int:
    """Rows of the embedding: what the real model beside a real tokenizer has, else the next multiple of 64."""
    if tokenizer_dir and (config := Path(tokenizer_dir) / "config.json").is_file():
        return json.loads(config.read_bytes())["vocab_size"]
    return -(-len(tokenizer) // 64) * 64


def _template(name: str) -> str:
    return (Path(__file__).parent / f"tiny_{name}_chat_template.jinja").read_text()


def _generation_config(tokenizer: PreTrainedTokenizerFast, *eos_tokens: str) -> GenerationConfig:
    stop = [tokenizer.convert_tokens_to_ids(token) for token in eos_tokens]
    return GenerationConfig(
        do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights by seed alone; the caller's random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _save(out: Path, model: PreTrainedModel, processor: Qwen2_5_VLProcessor | PreTrainedTokenizerFast) -> Path:
    with directory_in_place(out.absolute()) as directory:
        save_model(model, processor, directory)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_dft.tiny", description="Build a tiny random Qwen2.5-VL.")
    parser.add_argument("out", type=Path, help="directory to write; replaced when it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=("qwen2_5_vl", "qwen2", "llama"), default="qwen2_5_vl")
    parser.add_argument("--tokenizer-dir", type=Path, help="a real tokenizer to take instead of training one")
    arguments = parser.parse_args()
    shared = {"tokenizer_dir": arguments.tokenizer_dir, "seed": arguments.seed}
    if arguments.family == "qwen2_5_vl":
        build_tiny_vlm(arguments.out, **shared)
    else:
        build_tiny_text(arguments.out, arguments.family, **shared)
    print(arguments.out)


if __name__ == "__main__":
    main()
