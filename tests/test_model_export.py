"""Exports: what plain transformers loads is what was trained, or there is no export."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import skip
from throwaway import run_python

import vlm_dft.torchvision_shim

# isort: split
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import vlm_dft.export
from vlm_dft.config import LoraConfig
from vlm_dft.errors import ExportError, OutOfMemoryError
from vlm_dft.export import export
from vlm_dft.model import LoadedModel, add_lora, base_of, load, set_use_cache
from vlm_dft.model_files import model_sha256


def trained(directory: Path, lora: LoraConfig | None = None, **options) -> LoadedModel:
    """The model with every trainable weight moved, as after training: cache off, train mode."""
    loaded = load(directory, device="cpu", **options)
    if lora:
        loaded = dataclasses.replace(loaded, model=add_lora(base_of(loaded.model), lora, seed=1))
    set_use_cache(loaded.model, False)
    loaded.model.train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return loaded


def logits(model, processor, *, picture: bool) -> torch.Tensor:
    """Of one user turn, by nothing but transformers."""
    if not picture:
        chat = [{"role": "user", "content": "How many?"}]
        inputs = processor.apply_chat_template(chat, return_dict=True, return_tensors="pt")
    else:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
        text = processor.apply_chat_template(chat)
        inputs = processor(text=[text], images=[Image.new("RGB", (84, 56), "red")], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("targets", [None, "language", "all"])
def test_exported_vlm_computes_what_was_trained(targets: str | None, tiny_vlm: Path, tmp_path: Path) -> None:
    lora = LoraConfig.model_validate({"targets": targets}) if targets else None
    loaded = trained(tiny_vlm, lora)
    record = export(loaded, tmp_path / "export")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(record.path)
    processor = AutoProcessor.from_pretrained(record.path)
    expected = logits(loaded.model, loaded.processor, picture=True)
    torch.testing.assert_close(logits(model, processor, picture=True), expected, rtol=1e-4, atol=1e-5)
    original = logits(load(tiny_vlm, device="cpu").model, loaded.processor, picture=True)
    assert (expected - original).abs().max() > 0.01
    assert record.logit_difference < 1e-5
    assert record.model_sha256 == model_sha256(record.path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.get_text_config().use_cache


@pytest.mark.parametrize("fixture", ["tiny_qwen2", "tiny_llama"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, alpha=8)])
def test_exported_text_models_compute_what_was_trained(
    lora: LoraConfig | None, fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    loaded = trained(request.getfixturevalue(fixture), lora)
    record = export(loaded, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(record.path)
    found = logits(model, AutoTokenizer.from_pretrained(record.path), picture=False)
    torch.testing.assert_close(found, logits(loaded.model, loaded.processor, picture=False), rtol=1e-4, atol=1e-5)


def test_export_leaves_the_trained_model_as_it_was(tiny_vlm: Path, tmp_path: Path) -> None:
    loaded = trained(tiny_vlm, LoraConfig())
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    export(loaded, tmp_path / "export")
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.model.training
    assert not loaded.model.config.get_text_config().use_cache


def test_the_exported_adapter_on_its_base_computes_what_was_trained(tiny_vlm: Path, tmp_path: Path) -> None:
    loaded = trained(tiny_vlm, LoraConfig(targets="all"))
    record = export(loaded, tmp_path / "export")
    assert record.adapter == tmp_path / "export" / "adapter"
    assert record.adapter is not None
    reloaded = load(record.adapter, device="cpu")
    assert isinstance(reloaded.model, PeftModel)
    expected = logits(loaded.model, loaded.processor, picture=True)
    assert torch.equal(logits(reloaded.model, reloaded.processor, picture=True), expected)
    assert model_sha256(record.adapter) not in (record.model_sha256, model_sha256(tiny_vlm))


@pytest.mark.parametrize("master_weights", [False, True])
def test_bf16_export_is_bf16_and_keeps_tied_weights_tied(master_weights: bool, tiny_vlm: Path, tmp_path: Path) -> None:
    loaded = trained(tiny_vlm, precision="bf16", master_weights=master_weights)
    record = export(loaded, tmp_path / "export")
    weights = load_file(record.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    config = json.loads((record.path / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(record.path).dtype == torch.bfloat16


def test_export_holds_the_files_that_other_programs_look_for(tiny_vlm: Path, tmp_path: Path) -> None:
    record = export(load(tiny_vlm, device="cpu"), tmp_path / "export")
    assert {path.name for path in record.path.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert record.adapter is None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        assert (record.path / name).read_bytes() == (tiny_vlm / name).read_bytes()
    preprocessor = json.loads((record.path / "preprocessor_config.json").read_text())
    assert (preprocessor["patch_size"], preprocessor["merge_size"]) == (14, 2)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in record.path.iterdir()}
    assert len(modes) == 1, "the weights can be read by whoever may read the config"


def test_exporting_again_gives_the_same_hash_and_replaces_the_directory(tiny_qwen2: Path, tmp_path: Path) -> None:
    loaded = load(tiny_qwen2, device="cpu")
    first = export(loaded, tmp_path / "export")
    (first.path / "leftover").touch()
    second = export(loaded, tmp_path / "export")
    assert first.model_sha256 == second.model_sha256
    assert not (second.path / "leftover").exists()


def damage_weights(directory: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def damage_template(directory: Path) -> None:
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template.replace("helpful", "unhelpful"))


def damage_by_nan(directory: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def damage_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_weights, "logits differ"),
        (damage_template, "encodes .* differently"),
        (damage_by_nan, "not finite"),
        (damage_config, "cannot be loaded"),
    ],
)
def test_an_export_that_is_not_the_trained_model_never_appears(
    damage: Callable[[Path], None], reason: str, tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_damage(model, processor, directory, state_dict):
        save_model(model, processor, directory, state_dict)
        damage(directory)

    save_model = vlm_dft.export.save_model
    monkeypatch.setattr(vlm_dft.export, "save_model", save_and_damage)
    if damage is damage_config:
        monkeypatch.setattr(vlm_dft.export, "_state_dtype", lambda *_: None)
    with pytest.raises(ExportError, match=reason):
        export(trained(tiny_vlm), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_room_for_the_proof_is_its_own_error(tiny_vlm: Path, tmp_path: Path) -> None:
    loaded = trained(tiny_vlm)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded.model.forward = full
    with pytest.raises(OutOfMemoryError, match="the trained model and its export side by side"):
        export(loaded, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import pathlib, sys
from vlm_dft.errors import DiskFullError
from vlm_dft.export import export
from vlm_dft.model import load
loaded = load(sys.argv[1], device="cpu")
for disk in sys.argv[2:]:
    try:
        export(loaded, pathlib.Path(disk) / "export")
    except DiskFullError as error:
        print(error.message, [path.name for path in pathlib.Path(disk).iterdir()])
"""


def test_a_full_disk_is_its_own_error_and_nothing_half_written_stays(tiny_vlm: Path, tmp_path: Path) -> None:
    """Disks that are full while the weights, and while the smaller files after them, are written."""
    kibibytes = {"small": 300, "larger": 1560}
    disks = [tmp_path / name for name in kibibytes]
    for disk in disks:
        disk.mkdir()
    mounts = [f"mount -t tmpfs -o size={kibibytes[disk.name]}k tmpfs {disk}" for disk in disks]
    script = " && ".join([*mounts, 'exec "$0" -c "$@"'])
    command = ["unshare", "-rm", "sh", "-c", script, sys.executable, FULL_DISK, str(tiny_vlm), *map(str, disks)]
    if not shutil.which("unshare"):
        skip("no unshare to mount a small file system with")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.stderr.startswith(("unshare:", "mount:")):
        skip(f"no small file system can be mounted here: {result.stderr}")
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    for line, disk in zip(lines, disks, strict=True):
        assert line == f"no space left while writing {disk / 'export'}: free space and try again []"


REAL_TOKENIZER = """
import json, pathlib, resource, sys
from PIL import Image
from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import ImagePart, Message, TextPart
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder
from vlm_dft.model import load
from vlm_dft.tiny import build_tiny_vlm
import torch
out = build_tiny_vlm(sys.argv[2], tokenizer_dir=sys.argv[1], hidden_size=128, num_layers=3, vision_layers=2)
loaded = load(out, device="cpu")
picture = pathlib.Path(sys.argv[3])
message = Message(role="user", content=(
    ImagePart(image="", sha256="", width=224, height=224), TextPart(text="What is the missing number?")))
sample = Encoder(loaded.processor, PixelConfig()).encode_prompt([message], [picture])
batch = collate([sample] * 4, loaded.pad_token_id)
batch.pop("labels")
with torch.no_grad():
    logits = loaded.model(**batch).logits
print(json.dumps({
    "shape": list(logits.shape), "finite": bool(torch.isfinite(logits).all()),
    "images": int(sample.mm_token_type_ids_T.sum()), "image_token": loaded.image_token_id,
    "parameters": loaded.model.num_parameters(),
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


def test_the_real_vocabulary_on_a_small_model_takes_a_real_picture(shared_data: Path, tmp_path: Path) -> None:
    picture = shared_data / "puzzlevqa" / "images" / "grid_number" / "grid_number_0000.png"
    tokenizer = shared_data / "qwen2_5_vl_tokenizer"
    result = run_python("-W", "error", "-c", REAL_TOKENIZER, str(tokenizer), str(tmp_path / "model"), str(picture))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["shape"] == [4, 64 + 27, 151936]
    assert found["finite"]
    assert (found["images"], found["image_token"]) == (64, 151655)
    assert found["parameters"] < 21e6
    assert found["peak_gib"] < 2
