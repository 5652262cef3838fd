"""Encoding: what the real processor makes of a conversation, with labels on assistant turns only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, AutoTokenizer

from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import CanonicalDataset, ImagePart, Manifest, Message, Row, TextPart
from vlm_dft.data.encoding import IGNORED, Encoder
from vlm_dft.data.template import template_messages
from vlm_dft.errors import DatasetError, ModelError

PIXELS = PixelConfig(min_pixels=4 * 28 * 28, max_pixels=100 * 28 * 28)


def image_part(path: Path) -> ImagePart:
    with Image.open(path) as image:
        width, height = image.size
    return ImagePart(image=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), width=width, height=height)


def turn(role: str, *parts: str | ImagePart, train: bool = True) -> Message:
    content = tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts)
    return Message.model_validate({"role": role, "content": content, "train": train})


def dataset_of(path: Path, *rows: Row) -> CanonicalDataset:
    """A canonical dataset whose images are named absolutely."""
    path.mkdir()
    (path / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    manifest = Manifest(rows=len(rows), format="openai", filename="test.jsonl", image_root="/", fingerprint="0" * 64)
    (path / "dataset.json").write_text(manifest.model_dump_json())
    return CanonicalDataset.open(path)


def conversations(shared_data: Path, scratch: Path) -> list[Row]:
    """Text only; one picture; several pictures over several turns, grey, with transparency, tiny and large."""
    record = json.loads((shared_data / "puzzlevqa" / "wethink_train.jsonl").read_text().splitlines()[0])
    puzzle = image_part(shared_data / "puzzlevqa" / record["image_path"])
    grey, photo = (image_part(shared_data / "demo_images" / name) for name in ("camera.jpg", "coffee.jpg"))
    transparent = scratch / "transparent.png"
    Image.linear_gradient("L").resize((31, 57)).convert("RGBA").save(transparent)
    alpha = scratch / "alpha.png"
    Image.merge("RGBA", [*Image.new("RGB", (40, 30), "red").split(), Image.linear_gradient("L").resize((40, 30))]).save(
        alpha
    )
    return [
        Row(id="text", messages=(turn("user", "What is 2 + 3?"), turn("assistant", "It is 5."))),
        Row(
            id="puzzle",
            messages=(
                turn("system", "Think first."),
                turn("user", puzzle, record["problem"]),
                turn("assistant", f"<think>{record['refined_cot']}</think><answer>{record['answer']}</answer>"),
            ),
        ),
        Row(
            id="many",
            messages=(
                turn("user", "Look: ", grey, photo, " then 数学 é."),
                turn("assistant", "Two photographs.", train=False),
                turn("user", image_part(transparent), image_part(alpha), puzzle),
                turn("assistant", "And three more."),
            ),
        ),
    ]


def as_real_processor(processor, row: Row) -> dict[str, torch.Tensor]:
    """The recipe that Qwen2.5-VL's own documentation gives."""
    messages = template_messages(row.messages, vision=True)
    parts = [part for message in row.messages for part in message.content]
    for part, entry in zip(parts, (entry for m in messages for entry in m["content"]), strict=True):
        if isinstance(part, ImagePart):
            entry |= {"image": part.image, "min_pixels": PIXELS.min_pixels, "max_pixels": PIXELS.max_pixels}
    text = processor.apply_chat_template(messages, tokenize=False)
    images, _ = process_vision_info(messages)
    return processor(text=[text], images=images, return_tensors="pt")


@pytest.fixture(scope="module")
def real_processor(shared_data: Path):
    return AutoProcessor.from_pretrained(shared_data / "qwen2_5_vl_tokenizer")


def test_encoding_equals_the_real_processor(real_processor, shared_data: Path, tmp_path: Path) -> None:
    encoder = Encoder(real_processor, PIXELS)
    rows = conversations(shared_data, tmp_path)
    dataset = dataset_of(tmp_path / "dataset", *rows)
    for row in rows:
        expected = as_real_processor(real_processor, row)
        sample = encoder.encode(row, dataset)
        assert torch.equal(sample.input_ids_T, expected["input_ids"][0])
        assert sample.mm_token_type_ids_T is not None
        assert torch.equal(sample.mm_token_type_ids_T, expected["mm_token_type_ids"][0])
        if row.images:
            assert sample.pixel_values is not None
            assert torch.equal(sample.pixel_values, expected["pixel_values"])
            assert torch.equal(sample.image_grid_thw, expected["image_grid_thw"])
        else:
            assert sample.pixel_values is None
            assert sample.image_grid_thw is None


def test_encoding_equals_tokenizing_apply_chat_template(real_processor, shared_data: Path, tmp_path: Path) -> None:
    row = conversations(shared_data, tmp_path)[2]
    messages = template_messages(row.messages, vision=True)
    encoder = Encoder(real_processor, PIXELS)
    images = iter(encoder._resized(Image.open(part.image), row.id) for part in row.images)
    for entry in (entry for message in messages for entry in message["content"] if entry["type"] == "image"):
        entry["image"] = next(images)
    expected = real_processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    sample = encoder.encode(row, dataset_of(tmp_path / "dataset", row))
    assert torch.equal(sample.input_ids_T, expected["input_ids"][0])
    assert sample.pixel_values is not None
    assert torch.equal(sample.pixel_values, expected["pixel_values"])


def supervised_texts(sample, tokenizer) -> list[str]:
    """Text of each run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample.input_ids_T.tolist(), sample.labels_T.tolist(), strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_labels_are_trained_assistant_turns_and_their_end(real_processor, shared_data: Path, tmp_path: Path) -> None:
    rows = conversations(shared_data, tmp_path)
    encoder, dataset = Encoder(real_processor, PIXELS), dataset_of(tmp_path / "dataset", *rows)
    texts = [supervised_texts(encoder.encode(row, dataset), real_processor.tokenizer) for row in rows]
    assert texts[0] == ["It is 5.<|im_end|>"]
    assert texts[1] == [rows[1].messages[2].content[0].text + "<|im_end|>"]
    assert texts[2] == ["And three more.<|im_end|>"]


def test_llama_and_qwen2_rows_are_supervised_up_to_their_own_end(
    tiny_qwen2: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    row = Row(
        id="r",
        messages=(turn("user", "1?"), turn("assistant", "one"), turn("user", "2?"), turn("assistant", "two")),
    )
    dataset = dataset_of(tmp_path / "dataset", row)
    for directory, end in ((tiny_qwen2, "<|im_end|>"), (tiny_llama, "<|eot_id|>")):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        sample = Encoder(tokenizer, PIXELS).encode(row, dataset)
        assert supervised_texts(sample, tokenizer) == ["one" + end, "two" + end]
        assert sample.mm_token_type_ids_T is None


def test_a_prompt_is_the_encoded_row_up_to_its_answer(real_processor, shared_data: Path, tmp_path: Path) -> None:
    row = conversations(shared_data, tmp_path)[1]
    encoder = Encoder(real_processor, PIXELS)
    whole = encoder.encode(row, dataset_of(tmp_path / "dataset", row))
    prompt = encoder.encode_prompt(row.messages[:2], [Path(part.image) for part in row.images])
    assert torch.equal(prompt.input_ids_T, whole.input_ids_T[: len(prompt)])
    assert whole.labels_T[len(prompt)] != IGNORED
    assert (whole.labels_T[: len(prompt)] == IGNORED).all()
    assert prompt.supervised_tokens == 0
    opened = encoder.encode_prompt(row.messages[:2], [Image.open(part.image) for part in row.images])
    assert prompt.pixel_values is not None
    assert torch.equal(prompt.pixel_values, opened.pixel_values)
    assert torch.equal(prompt.pixel_values, whole.pixel_values), "evaluation sees what training saw"


@pytest.mark.parametrize("max_tokens", [4, 16, 100])
def test_length_is_known_without_opening_images(
    max_tokens: int, real_processor, shared_data: Path, tmp_path: Path
) -> None:
    encoder = Encoder(real_processor, PixelConfig(min_pixels=28 * 28, max_pixels=max_tokens * 28 * 28))
    rows = conversations(shared_data, tmp_path)
    dataset = dataset_of(tmp_path / "dataset", *rows)
    assert [encoder.num_tokens(row) for row in rows] == [len(encoder.encode(row, dataset)) for row in rows]


def picture_row(path: Path) -> Row:
    return Row(id="train.jsonl:7", messages=(turn("user", image_part(path), "?"), turn("assistant", "!")))


def spoil_by_change(path: Path) -> None:
    Image.new("RGB", (30, 30), "blue").save(path)


def spoil_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(spoil_by_change, "changed since"), (spoil_by_truncation, "changed since"), (Path.unlink, "cannot be read")],
)
def test_an_image_that_changed_on_disk_is_an_error_naming_row_and_path(
    spoil, reason: str, real_processor, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    row = picture_row(picture)
    dataset = dataset_of(tmp_path / "dataset", row)
    spoil(picture)
    with pytest.raises(DatasetError, match=reason) as caught:
        Encoder(real_processor, PIXELS).encode(row, dataset)
    assert "train.jsonl:7" in caught.value.message
    assert str(picture) in caught.value.message


def test_a_prompt_image_that_is_none_is_an_error_naming_both(real_processor, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    messages = picture_row(picture).messages[:1]
    spoil_by_truncation(picture)
    with pytest.raises(DatasetError, match=r"item 3: image .*picture.png cannot be decoded"):
        Encoder(real_processor, PIXELS).encode_prompt(messages, [picture], row_id="item 3")
    with pytest.raises(DatasetError, match=r"item 3: 0 images for 1 image parts"):
        Encoder(real_processor, PIXELS).encode_prompt(messages, row_id="item 3")


def test_an_image_without_room_under_the_limits_is_an_error_naming_the_row(real_processor, tmp_path: Path) -> None:
    picture = tmp_path / "line.png"
    Image.new("RGB", (2000, 11)).save(picture)
    row = picture_row(picture)
    small = PixelConfig(min_pixels=28 * 28, max_pixels=28 * 28)
    with pytest.raises(DatasetError, match=r"train.jsonl:7: .*2000 x 11"):
        Encoder(real_processor, small).encode(row, dataset_of(tmp_path / "dataset", row))


def test_pictures_for_a_text_model_are_an_error(tiny_qwen2: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 30)).save(picture)
    row = picture_row(picture)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_qwen2), PIXELS)
    with pytest.raises(DatasetError, match="text model"):
        encoder.encode(row, dataset_of(tmp_path / "dataset", row))


def test_a_tokenizer_without_chat_template_is_refused(tiny_qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(tokenizer, PIXELS)
