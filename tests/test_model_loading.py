"""Loading: only what fits is loaded, everything else is refused by name; freezing and adapters do what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_dft.config import FreezeConfig, FullConfig, LoraConfig
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.model import adapt, add_lora, base_of, choose_device, choose_dtype, freeze, load, set_use_cache
from vlm_dft.model_files import model_sha256
from vlm_dft.tiny import build_tiny_vlm


def test_each_family_loads_with_the_facts_others_need(tiny_vlm: Path, tiny_qwen2: Path, tiny_llama: Path) -> None:
    ends = {tiny_vlm: "<|im_end|>", tiny_qwen2: "<|im_end|>", tiny_llama: "<|eot_id|>"}
    pads = {tiny_vlm: "<|endoftext|>", tiny_qwen2: "<|endoftext|>", tiny_llama: "<|pad|>"}
    for directory, end in ends.items():
        loaded = load(directory, device="cpu")
        token = loaded.tokenizer.convert_ids_to_tokens
        assert token(loaded.end_of_turn_token_id) == end
        assert token(loaded.pad_token_id) == pads[directory]
        assert loaded.is_vision == (directory == tiny_vlm)
        assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
        assert not loaded.model.training
        if loaded.is_vision:
            assert token(loaded.image_token_id) == "<|image_pad|>"
        else:
            assert loaded.image_token_id is None


def test_a_tokenizer_without_padding_pads_with_its_end_of_turn(tiny_llama: Path) -> None:
    loaded = load(tiny_llama, device="cpu")
    loaded.tokenizer.pad_token = None
    assert loaded.pad_token_id == loaded.end_of_turn_token_id


def test_precision_decides_the_weights_unless_master_weights_are_asked_for(tiny_qwen2: Path) -> None:
    assert load(tiny_qwen2, precision="bf16", device="cpu").model.dtype == torch.bfloat16
    master = load(tiny_qwen2, precision="bf16", device="cpu", master_weights=True)
    assert (master.dtype, master.model.dtype) == (torch.bfloat16, torch.float32)
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_precision_is_bf16_on_a_capable_gpu(tiny_vlm: Path) -> None:
    loaded = load(tiny_vlm)
    assert (loaded.dtype, loaded.device.type) == (torch.bfloat16, "cuda")


def test_a_device_that_is_not_there_is_a_config_error() -> None:
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match=f"device {device} cannot be used"):
            choose_device(device)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def to_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def to_index_with_a_lost_shard(directory: Path) -> None:
    names = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


NORM = "model.norm.weight"
SPOILED = {
    "another architecture": (lambda d: edit_json(d / "config.json", model_type="bert"), r"'bert' model; supported are"),
    "another head": (
        lambda d: edit_json(d / "config.json", architectures=["Qwen2ForSequenceClassification"]),
        "only Qwen2_5_VLForConditionalGeneration is supported",
    ),
    "remote code": (
        lambda d: edit_json(d / "config.json", auto_map={"AutoConfig": "evil.Config"}),
        "run code of its own",
    ),
    "quantized": (lambda d: edit_json(d / "config.json", quantization_config={}), "quantized"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config.json does not exist"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "config of wrong types": (
        lambda d: edit_json(d / "config.json", text_config={"hidden_size": "large"}),
        "cannot be loaded",
    ),
    "pickle only": (to_pickle, "pickles"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "lost shard": (to_index_with_a_lost_shard, "model-00002-of-00002.safetensors is missing"),
    "torn weights": (lambda d: (d / "model.safetensors").write_bytes(b"torn"), "cannot be loaded"),
    "weights short of one": (lambda d: edit_weights(d, lambda w: w.pop(NORM)), "1 missing keys, first .*norm.weight"),
    "weights with one too many": (
        lambda d: edit_weights(d, lambda w: w.update({"model.extra": torch.zeros(2)})),
        "1 unexpected keys, first .*extra",
    ),
    "weights of another size": (lambda d: edit_weights(d, lambda w: w.update({NORM: torch.zeros(3)})), "cannot be"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer torn": (lambda d: (d / "tokenizer.json").write_text("{}"), "processor in .* cannot be loaded"),
    "no image processor": (
        lambda d: [(d / f"{name}_config.json").unlink() for name in ("processor", "preprocessor")],
        "no image processor",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_directory_that_is_not_a_whole_supported_model_is_refused(case: str, tiny_vlm: Path, tmp_path: Path) -> None:
    spoil, reason = SPOILED[case]
    directory = tmp_path / "model"
    shutil.copytree(tiny_vlm, directory)
    spoil(directory)
    with pytest.raises(ModelError, match=reason) as caught:
        load(directory, device="cpu")
    assert str(directory) in caught.value.message


def test_code_beside_a_model_is_never_run(tiny_vlm: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_vlm, directory)
    witness = tmp_path / "was-run"
    (directory / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        edit_json(directory / name, auto_map={"AutoTokenizer": ["evil.T", "evil.T"], "AutoProcessor": "evil.P"})
    load(directory, device="cpu")
    assert not witness.exists()


def test_a_smaller_embedding_than_vocabulary_is_refused(tiny_vlm: Path, tmp_path: Path) -> None:
    small = build_tiny_vlm(tmp_path / "small", texts=["a"])
    shutil.copy(tiny_vlm / "tokenizer.json", small / "tokenizer.json")
    with pytest.raises(ModelError, match=r"has \d+ tokens, the model's embedding only"):
        load(small, device="cpu")


@pytest.mark.parametrize("source", ["nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_name_that_is_no_directory_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="neither a directory nor a hub id"):
        load(source, device="cpu")


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(ModelError, match="needs a revision"):
        load("Qwen/Qwen2.5-VL-3B-Instruct", device="cpu")


def test_an_unreachable_hub_model_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be fetched"):
        load("Qwen/Qwen2.5-VL-3B-Instruct", revision="0" * 40, device="cpu")


def trainable_parts(model: nn.Module) -> set[str]:
    parts = {"merger": "model.visual.merger.", "vision_tower": "model.visual.", "language_model": ""}
    found = set()
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in parts.items() if name.startswith(prefix))
        if parameter.requires_grad:
            found.add(part)
    return found


@pytest.mark.parametrize("unfrozen", [{"vision_tower"}, {"merger"}, {"language_model"}, {"merger", "language_model"}])
def test_freezing_leaves_exactly_the_other_parts_trainable(unfrozen: set[str], tiny_vlm: Path) -> None:
    model = base_of(load(tiny_vlm, device="cpu").model)
    freeze(model, FreezeConfig(**{part: part not in unfrozen for part in FreezeConfig.model_fields}))
    assert trainable_parts(model) == unfrozen


def test_freezing_everything_is_a_config_error(tiny_vlm: Path, tiny_qwen2: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(base_of(load(tiny_vlm, device="cpu").model), FreezeConfig(language_model=True))
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(base_of(load(tiny_qwen2, device="cpu").model), FreezeConfig(language_model=True, vision_tower=False))


@pytest.mark.parametrize("fixture", ["tiny_vlm", "tiny_qwen2", "tiny_llama"])
@pytest.mark.parametrize("targets", ["language", "all"])
def test_lora_adapts_every_linear_layer_of_its_targets(
    targets: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(fixture)
    model = base_of(load(directory, device="cpu").model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    if targets == "language":
        linears = {name for name in linears if "visual" not in name}
    adapted = adapt(model, LoraConfig.model_validate({"targets": targets}), FreezeConfig(), seed=1)
    trainable = {name for name, parameter in base_of(adapted).named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{side}.default.weight" for name in linears for side in "AB"}


def test_lora_starts_the_same_for_the_same_seed_and_changes_nothing_yet(tiny_vlm: Path) -> None:
    def adapters(seed: int) -> list[torch.Tensor]:
        model = add_lora(base_of(load(tiny_vlm, device="cpu").model), LoraConfig(r=4, alpha=16), seed)
        assert model.peft_config["default"].r == 4
        return [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    state = torch.random.get_rng_state()
    first, again, other = adapters(1), adapters(1), adapters(2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    loaded = load(tiny_vlm, device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    before = loaded.model(input_ids=ids).logits
    assert torch.equal(add_lora(base_of(loaded.model), LoraConfig(), 1)(input_ids=ids).logits, before)


def test_lora_adds_alpha_over_r_times_what_its_matrices_give(tiny_qwen2: Path) -> None:
    model = add_lora(base_of(load(tiny_qwen2, device="cpu").model), LoraConfig(r=4, alpha=24), 1)
    layer = base_of(model).model.layers[0].self_attn.q_proj
    down_RD, up_DR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (down_RD.shape[0], up_DR.shape[1]) == (4, 4)
    with torch.no_grad():
        up_DR.normal_()
        hidden_ND = torch.randn(5, down_RD.shape[1])
        expected = layer.base_layer(hidden_ND) + 24 / 4 * hidden_ND @ down_RD.T @ up_DR.T
        torch.testing.assert_close(layer(hidden_ND), expected)


def test_freeze_and_lora_contradict_each_other(tiny_vlm: Path) -> None:
    model = base_of(load(tiny_vlm, device="cpu").model)
    with pytest.raises(ConfigError, match=r"choose adapter.targets") as caught:
        adapt(model, LoraConfig(), FreezeConfig(merger=False), seed=1)
    assert caught.value.param == "freeze"
    assert adapt(model, FullConfig(), FreezeConfig(merger=False), seed=1) is model


def test_the_cache_is_switched_where_the_decoder_looks(tiny_vlm: Path) -> None:
    model = load(tiny_vlm, device="cpu").model
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).past_key_values is not None
    set_use_cache(model, False)
    assert model(input_ids=ids).past_key_values is None


def test_weight_hash_depends_on_the_weights_alone(tiny_vlm: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vlm, copy)
    edit_json(copy / "config.json", note="changed")
    assert model_sha256(copy) == model_sha256(tiny_vlm)
    edit_weights(copy, lambda weights: weights[NORM].mul_(2))
    assert model_sha256(copy) != model_sha256(tiny_vlm)
