"""Tiny models: real classes, loadable by plain transformers, the same bytes for the same seed."""

from __future__ import annotations

from pathlib import Path

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import jinja2
import pytest
import torch
from PIL import Image
from throwaway import run_python
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vlm_dft.tiny import BUILT_IN_TEXTS, Dims, build_tiny_text, build_tiny_vlm

CONVERSATIONS = [
    [{"role": "user", "content": "How many?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image", "image": "x"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": " and\n now? "}, {"image_url": "y"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>é</think>"}]},
    ],
]


def test_tiny_vlm_answers_a_picture_through_plain_transformers(tiny_vlm: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vlm)
    processor = AutoProcessor.from_pretrained(tiny_vlm)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.new("RGB", (84, 56), "red")], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 6
    generated = model.generate(**inputs, max_new_tokens=3)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_tiny_text_models_load_with_their_chat_template(family: str, tiny_qwen2: Path, tiny_llama: Path) -> None:
    directory = {"qwen2": tiny_qwen2, "llama": tiny_llama}[family]
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.model_type == family
    encoded = tokenizer.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True, return_dict=True)
    ids = torch.tensor([encoded["input_ids"]])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


@pytest.mark.parametrize("text", [*BUILT_IN_TEXTS, "naïve 数学 🙂\t\r\n  x²", "<|im_start|>", ""])
def test_tiny_tokenizers_write_any_text(text: str, tiny_vlm: Path, tiny_llama: Path) -> None:
    for directory in (tiny_vlm, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("add_vision_id", [False, True])
def test_tiny_chat_template_renders_as_qwens(
    add_generation_prompt: bool, add_vision_id: bool, tiny_vlm: Path, shared_data: Path
) -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    real = environment.from_string((shared_data / "qwen2_5_vl_tokenizer" / "chat_template.jinja").read_text())
    ours = environment.from_string((tiny_vlm / "chat_template.jinja").read_text())
    for messages in CONVERSATIONS:
        options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
        assert ours.render(messages=messages, **options) == real.render(messages=messages, **options)


def test_tiny_models_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    one, two = (build_tiny_vlm(tmp_path / name, seed=7) for name in ("one", "two"))
    other = build_tiny_vlm(tmp_path / "other", seed=8)
    for file in ("model.safetensors", "tokenizer.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert torch.equal(state, torch.random.get_rng_state())


def test_tiny_tokenizer_learns_from_given_texts(tmp_path: Path) -> None:
    directory = build_tiny_text(tmp_path / "model", texts=["quadrilateral quadrilateral"] * 10)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.tokenize("quadrilateral") == ["quadrilateral"]


@pytest.mark.parametrize(
    "dims", [{"hidden_size": 60}, {"num_kv_heads": 3}, {"window_size": 100}, {"vision_hidden_size": 24}]
)
def test_dimensions_that_cannot_be_are_refused(dims: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"divide|multiple"):
        Dims(**dims)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32])
def test_mrope_sections_sum_to_half_a_head(heads: int) -> None:
    dims = Dims(num_heads=heads, num_kv_heads=1)
    assert sum(dims.mrope_section) == 64 // heads // 2


def test_torchvision_imports_after_the_shim_with_its_own_name() -> None:
    result = run_python(
        "-W", "error", "-c", "import vlm_dft.torchvision_shim, torchvision; print(torchvision.__name__)"
    )
    assert (result.returncode, result.stdout) == (0, "torchvision\n"), result.stderr
