"""Counts that validation writes are the counts of training, for any pixel limits; the hash names the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_samples import jsonl, openai_row, picture, tar_of, validated, wethink_row

import vlm_dft.torchvision_shim  # noqa: F401
from vlm_dft.config import PixelConfig
from vlm_dft.data.tokenizer import load_template
from vlm_dft.data.tokens import overlong_rows, row_tokens, tokenizer_sha256
from vlm_dft.errors import DatasetError, ModelError

SMALL = PixelConfig(min_pixels=784, max_pixels=16 * 784)
LARGE = PixelConfig(min_pixels=784, max_pixels=1280 * 784)


def two_pictures() -> bytes:
    rows = jsonl(wethink_row(), wethink_row(image_path="images/b.png", problem="Which one is it then, if any at all?"))
    return tar_of({"data.jsonl": rows, "images/a.png": picture(100, 60), "images/b.png": picture(900, 700)})


@pytest.mark.parametrize("pixels", [SMALL, LARGE])
def test_counts_are_those_of_the_training_encoder(tmp_path: Path, tiny_vlm: Path, pixels: PixelConfig) -> None:
    from transformers import AutoProcessor

    from vlm_dft.data.encoding import Encoder

    found = validated(tmp_path, two_pictures(), tokenizer=str(tiny_vlm))
    encoder = Encoder(AutoProcessor.from_pretrained(tiny_vlm), pixels)
    for row in found.rows:
        sample = encoder.encode(row, found.dataset)
        assert row_tokens(row, pixels) == len(sample)
        assert row.supervised_tokens == sample.supervised_tokens


def test_statistics_are_sums_over_the_rows(tmp_path: Path, tiny_vlm: Path) -> None:
    found = validated(tmp_path, two_pictures(), tokenizer=str(tiny_vlm), pixels=LARGE)
    tokens = found.report.tokens
    assert tokens is not None
    totals = [row_tokens(row, LARGE) for row in found.rows]
    assert (tokens.total.total, tokens.total.min, tokens.total.max) == (sum(totals), min(totals), max(totals))
    assert tokens.visual.total == tokens.total.total - tokens.text.total == 4 * 2 + 32 * 25
    assert tokens.supervised.total == sum(row.supervised_tokens or 0 for row in found.rows)
    assert tokens.tokenizer_sha256 == tokenizer_sha256(tiny_vlm) == found.dataset.manifest.tokenizer_sha256


def test_rows_above_the_limit_are_listed_at_any_pixel_limits(tmp_path: Path, tiny_vlm: Path) -> None:
    found = validated(tmp_path, two_pictures(), tokenizer=str(tiny_vlm), pixels=LARGE, max_length_tokens=700)
    assert found.report.overlong == 1
    assert found.report.overlong_rows == tuple(overlong_rows(found.dataset, LARGE, 700))
    assert (found.report.overlong_rows[0].file, found.report.overlong_rows[0].line) == ("data.jsonl", 2)
    longest = max(row_tokens(row, SMALL) for row in found.rows)
    assert overlong_rows(found.dataset, SMALL, longest) == []
    assert len(overlong_rows(found.dataset, SMALL, longest - 1)) >= 1


def test_rows_without_counts_say_so(tmp_path: Path) -> None:
    found = validated(tmp_path, jsonl(openai_row()))
    assert found.report.tokens is None
    with pytest.raises(DatasetError, match="validated without a tokenizer"):
        row_tokens(found.rows[0], LARGE)
    with pytest.raises(DatasetError, match="validated without a tokenizer"):
        overlong_rows(found.dataset, LARGE, 100)


def test_a_saved_copy_of_a_tokenizer_has_its_hash(tmp_path: Path, tiny_vlm: Path) -> None:
    """So a fine-tuned model's jobs can use the counts made for its base."""
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(tiny_vlm).save_pretrained(tmp_path)
    assert tokenizer_sha256(tmp_path) == tokenizer_sha256(tiny_vlm)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_vocabulary_or_template_has_another_hash(tmp_path: Path, tiny_vlm: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vlm, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    before = tokenizer_sha256(copy)
    text = (copy / name).read_text()
    changed = text.replace("<|im_start|>", "<|im_begin|>") if name == "tokenizer.json" else text + "\n"
    assert changed != text
    (copy / name).write_text(changed)
    assert tokenizer_sha256(copy) != before == tokenizer_sha256(tiny_vlm)


def test_the_hash_of_the_real_tokenizer_needs_no_tokenizer_json(shared_data: Path) -> None:
    folder = shared_data / "qwen2_5_vl_tokenizer"
    assert len(tokenizer_sha256(folder)) == 64
    assert not (folder / "tokenizer.json").exists()


def test_an_older_vision_model_directory_gives_its_vision_template(tmp_path: Path, shared_data: Path) -> None:
    """Its tokenizer_config.json holds the text template; the vision one is chat_template.json."""
    copy = tmp_path / "model"
    shutil.copytree(shared_data / "qwen2_5_vl_tokenizer", copy, copy_function=shutil.copyfile)
    with_jinja = load_template(str(copy))
    copy.chmod(0o755)
    (copy / "chat_template.jinja").unlink()
    assert load_template(str(copy)).source.strip() == with_jinja.source.strip()
    assert with_jinja.vision
    assert with_jinja.source != json.loads((copy / "tokenizer_config.json").read_text())["chat_template"]


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for load in (tokenizer_sha256, load_template):
        with pytest.raises(ModelError, match="has neither tokenizer"):
            load(str(tmp_path))


def test_a_broken_tokenizer_is_an_error_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="does not exist"):
        load_template(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_template(str(tmp_path))
