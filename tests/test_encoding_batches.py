"""Batches: neither padding nor neighbours change what the model computes for a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image

from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import ImagePart, Message, TextPart
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import IGNORED, Encoder, Sample
from vlm_dft.model import LoadedModel, load

TOLERANCE = 1e-5
SIDES = ("right", "left")
Side = Literal["left", "right"]


def prompts(loaded: LoadedModel) -> list[Sample]:
    """Different lengths; for vision models without, with one and with two pictures of different shapes."""
    encoder = Encoder(loaded.processor, PixelConfig())
    samples = []
    for index, sizes in enumerate([(), ((84, 56),), ((28, 140), (112, 112)), ()]):
        sizes = sizes if loaded.is_vision else ()
        images = [Image.linear_gradient("L").resize(size).convert("RGB") for size in sizes]
        parts = [ImagePart(image="", sha256="", width=width, height=height) for width, height in sizes]
        message = Message(role="user", content=(*parts, TextPart(text="How many shapes are there? " * (index + 1))))
        samples.append(encoder.encode_prompt([message], images, row_id=str(index)))
    return samples


def forward(loaded: LoadedModel, samples: list[Sample], side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(samples, loaded.pad_token_id, side)
    batch.pop("labels")
    with torch.no_grad():
        return loaded.model(**batch).logits, batch["attention_mask"].bool()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fixture", ["tiny_vlm", "tiny_qwen2", "tiny_llama"])
def test_padded_logits_equal_those_of_the_sample_alone(
    side: Side, fixture: str, request: pytest.FixtureRequest
) -> None:
    loaded = load(request.getfixturevalue(fixture), device="cpu")
    samples = prompts(loaded)
    logits_BTV, mask_BT = forward(loaded, samples, side)
    assert not mask_BT.all()
    for row, sample in enumerate(samples):
        alone_BTV, _ = forward(loaded, [sample], side)
        assert (logits_BTV[row][mask_BT[row]] - alone_BTV[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("fixture", ["tiny_vlm", "tiny_llama"])
def test_batched_generation_equals_generation_alone(fixture: str, request: pytest.FixtureRequest) -> None:
    loaded = load(request.getfixturevalue(fixture), device="cpu")
    with torch.no_grad():  # random weights of std 0.02 tie nearly everything: make the choices clear-cut
        for parameter in loaded.model.parameters():
            parameter.mul_(5.0)

    def generate(samples: list[Sample]) -> torch.Tensor:
        batch = collate(samples, loaded.pad_token_id, side="left")
        batch.pop("labels")
        out = loaded.model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return out[:, batch["input_ids"].shape[1] :]

    samples = prompts(loaded)
    together = generate(samples)
    for row, sample in enumerate(samples):
        assert torch.equal(together[row], generate([sample])[0])
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_a_batch_has_only_the_keys_its_samples_need(tiny_vlm: Path, tiny_qwen2: Path) -> None:
    vision, text = load(tiny_vlm, device="cpu"), load(tiny_qwen2, device="cpu")
    always = {"input_ids", "labels", "attention_mask"}
    samples = prompts(vision)
    assert set(collate(prompts(text), 0)) == always
    assert set(collate(samples[:1], 0)) == always | {"mm_token_type_ids"}
    assert set(collate(samples, 0)) == always | {"mm_token_type_ids", "pixel_values", "image_grid_thw"}


@pytest.mark.parametrize("side", SIDES)
def test_padding_is_masked_and_never_a_label(side: Side) -> None:
    def sample(*ids: int) -> Sample:
        tensor = torch.tensor(ids)
        return Sample("r", tensor, tensor, None, None, None)

    batch = collate([sample(5, 6, 7), sample(8)], 3, side)
    padded = [[8, 3, 3], [3, 3, 8]][side == "left"]
    assert batch["input_ids"].tolist() == [[5, 6, 7], padded]
    assert batch["labels"].tolist() == [[5, 6, 7], [IGNORED if token == 3 else token for token in padded]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(token != 3) for token in padded]]
