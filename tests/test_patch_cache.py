"""The patch cache: the same numbers as the processor's, kept in files that may be cut short or share a directory."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from datasets_for_tests import shapes_dataset
from throwaway import wait_until

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlm_dft.batches import Rows
from vlm_dft.config import CacheConfig, PixelConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.encoding import Encoder
from vlm_dft.data.patch_cache import Normalisation, PatchCache, patches_of
from vlm_dft.data.tensor_files import TensorFiles
from vlm_dft.errors import ConfigError, DatasetError, DiskFullError

PIXELS = PixelConfig(max_pixels=64 * 28 * 28)


@pytest.fixture(scope="module")
def processor(tiny_vlm: Path):
    return AutoProcessor.from_pretrained(tiny_vlm)


@pytest.fixture
def dataset(tmp_path: Path) -> CanonicalDataset:
    return CanonicalDataset.open(shapes_dataset(tmp_path / "dataset", 8))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_normalised_patches_are_the_processors_pixels_bit_for_bit(processor):
    pictures = [noise(84, 56), noise(56, 140), noise(448, 448)]
    patches_PD = torch.cat([patches_of(picture) for picture in pictures])
    found = Normalisation(processor.image_processor)(patches_PD)
    expected = processor.image_processor(images=pictures, do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)
    by_pil = Qwen2VLImageProcessorPil()(images=pictures, do_resize=False, return_tensors="pt")["pixel_values"]
    assert (found - by_pil).abs().max() <= 1e-6


def test_a_processor_that_does_not_normalise_is_refused(processor):
    image_processor = type(processor.image_processor)(do_normalize=False)
    with pytest.raises(ConfigError, match="does not normalise"):
        Normalisation(image_processor)


def test_cached_samples_are_those_that_the_encoder_makes(processor, dataset: CanonicalDataset, tmp_path: Path):
    encoder = Encoder(processor, PIXELS)
    normalise = Normalisation(processor.image_processor)
    rows = Rows(dataset)
    config = CacheConfig(directory=tmp_path / "cache")
    parts = [part for row in dataset for part in row.images]
    assert PatchCache(config, encoder, dataset).reserve(parts) == len({part.sha256 for part in parts})
    for _ in range(2):  # made, then read
        cache = PatchCache(config, encoder, dataset)
        for index in range(len(dataset)):
            expected = encoder.encode(rows[index], dataset)
            bare = encoder.encode_tokens(rows[index])
            found = cache.attach(bare)
            for name in ("input_ids_T", "labels_T", "mm_token_type_ids_T"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
            assert found.images == expected.images
            if expected.pixel_values is None:
                assert found.pixel_values is None
                assert found.image_grid_thw is None
                continue
            assert found.pixel_values is not None
            assert found.pixel_values.dtype == torch.uint8
            assert torch.equal(normalise(found.pixel_values), expected.pixel_values)
            assert torch.equal(found.image_grid_thw, expected.image_grid_thw)
        assert cache.reserve(parts) == 0


def test_later_epochs_open_no_image(processor, dataset: CanonicalDataset, tmp_path: Path):
    cache = PatchCache(CacheConfig(directory=tmp_path / "cache"), Encoder(processor, PIXELS), dataset)
    sample = Encoder(processor, PIXELS).encode_tokens(Rows(dataset)[0])
    first = cache.attach(sample)
    dataset.image_path(sample.images[0]).unlink()
    assert torch.equal(cache.attach(sample).pixel_values, first.pixel_values)
    other = Encoder(processor, PixelConfig(max_pixels=4 * 28 * 28))  # other limits are other files
    with pytest.raises(DatasetError, match=r"test.jsonl:1: image .* cannot be read"):
        PatchCache(CacheConfig(directory=tmp_path / "cache"), other, dataset).attach(sample)


def test_a_picture_that_changed_since_validation_never_enters(processor, dataset: CanonicalDataset, tmp_path: Path):
    encoder = Encoder(processor, PIXELS)
    sample = encoder.encode_tokens(Rows(dataset)[0])
    Image.new("RGB", (56, 56), "black").save(dataset.image_path(sample.images[0]))
    cache = PatchCache(CacheConfig(directory=tmp_path / "cache"), encoder, dataset)
    with pytest.raises(DatasetError, match="changed since it was validated"):
        cache.attach(sample)
    assert not [path for path in (tmp_path / "cache").rglob("*") if sample.images[0].sha256 in path.name]


def test_a_file_cut_short_is_made_again(processor, dataset: CanonicalDataset, tmp_path: Path):
    cache = PatchCache(CacheConfig(directory=tmp_path / "cache"), Encoder(processor, PIXELS), dataset)
    sample = Encoder(processor, PIXELS).encode_tokens(Rows(dataset)[0])
    whole = cache.attach(sample).pixel_values.clone()
    (file,) = (tmp_path / "cache").rglob(sample.images[0].sha256)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(cache.attach(sample).pixel_values, whole)
    assert file.stat().st_size == whole.nbytes


def test_the_budget_is_checked_before_anything_is_written(processor, dataset: CanonicalDataset, tmp_path: Path):
    config = CacheConfig(directory=tmp_path / "cache", max_gib=1e-5)
    parts = [part for row in dataset for part in row.images]
    cache = PatchCache(config, Encoder(processor, PIXELS), dataset)
    with pytest.raises(ConfigError, match=r"patches of \d+ images take .* GiB.*max_gib is 1e-05") as caught:
        cache.reserve(parts)
    assert caught.value.param == "train.patch_cache.max_gib"
    assert [path.name for path in (tmp_path / "cache").glob("[0-9a-f]*/*")] == ["settings.json"]


def use_for_a_minute(directory: Path, name: str) -> None:
    """Another process that has reserved one file of 1000 bytes, until it is ended."""
    files = TensorFiles(CacheConfig(directory=directory), {"run": 0}, torch.uint8)
    files.write(name, torch.zeros(1000, dtype=torch.uint8))
    files.reserve({name: (1000,)}, what="x", param="patch_cache")
    os.utime(files._path(name), (0, 0))
    (directory / "ready").touch()
    time.sleep(60)


def names_of(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("??") if path.is_file()}


def test_the_longest_unused_files_make_room_and_those_that_a_run_uses_stay(tmp_path: Path):
    other = multiprocessing.get_context("fork").Process(target=use_for_a_minute, args=(tmp_path, "aa"))
    other.start()
    wait_until((tmp_path / "ready").exists, 10, "the other run")
    mine = TensorFiles(CacheConfig(directory=tmp_path, max_gib=3500 / 2**30), {"run": 1}, torch.uint8)
    for age, name in enumerate(("bb", "cc", "dd")):
        mine.write(name, torch.zeros(500, dtype=torch.uint8))
        os.utime(mine._path(name), (time.time() - 10 * age,) * 2)
    assert mine.reserve({"cc": (500,), "ee": (1200,)}, what="x", param="patch_cache") == ["ee"]
    assert names_of(tmp_path) == {"aa", "bb", "cc"}
    with pytest.raises(ConfigError, match=r"holds .* that are in use"):
        mine.reserve({"ff": (2200,)}, what="x", param="patch_cache")
    other.kill()
    other.join()
    assert mine.reserve({"ff": (2200,)}, what="x", param="patch_cache") == ["ff"]
    assert names_of(tmp_path) == {"cc"}


def test_a_full_disk_is_noticed_before_the_run(tmp_path: Path):
    files = TensorFiles(CacheConfig(directory=tmp_path, max_gib=2.0**40), {}, torch.uint8)
    with pytest.raises(DiskFullError, match=r"need .* GiB more, the disk of .* has"):
        files.reserve({"aa": (2**60,)}, what="x", param="patch_cache")


def test_an_abandoned_half_written_file_is_removed_and_a_fresh_one_left(tmp_path: Path):
    files = TensorFiles(CacheConfig(directory=tmp_path), {}, torch.uint8)
    old, new = files.directory / ".aa.1.tmp", files.directory / ".bb.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    files.reserve({}, what="x", param="patch_cache")
    assert (old.exists(), new.exists()) == (False, True)


def test_a_directory_that_cannot_be_made_is_a_config_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        TensorFiles(CacheConfig(directory=tmp_path / "file"), {}, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written(dtype: torch.dtype, tmp_path: Path):
    files = TensorFiles(CacheConfig(directory=tmp_path), {}, dtype)
    tensor = torch.arange(24).view(4, 6).to(dtype)
    files.write("name", tensor)
    assert torch.equal(files.read("name", (4, 6)), tensor)
    assert files.read("name", (4, 7)) is None
    assert files.read("other", (4, 6)) is None


def test_several_pictures_of_a_row_are_attached_in_their_order(processor, dataset: CanonicalDataset, tmp_path: Path):
    encoder = Encoder(processor, PIXELS)
    rows = [row for row in dataset if row.images][:3]
    together = rows[0].model_copy(update={"messages": sum((row.messages for row in rows), ())})
    cache = PatchCache(CacheConfig(directory=tmp_path / "cache"), encoder, dataset)
    found = Normalisation(processor.image_processor)(cache.attach(encoder.encode_tokens(together)).pixel_values)
    expected = encoder.encode(together, dataset)
    assert torch.equal(found, expected.pixel_values)
    assert expected.images == tuple(part for row in rows for part in row.images)
