"""Training from caches of pictures gives what training from image files gives, and refuses where it could not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from datasets_for_tests import metrics_of, shapes_dataset
from gradients_for_tests import config_of, loaded_for

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from vlm_dft import vision_cache
from vlm_dft.batches import Corpus, Plan, Steps, open_corpus
from vlm_dft.config import CacheConfig, FreezeConfig, LoraConfig, RunConfig, TrainConfig
from vlm_dft.data.encoding import Encoder
from vlm_dft.errors import ConfigError, DatasetError, OutOfMemoryError
from vlm_dft.model import LoadedModel, base_of
from vlm_dft.pictures import Pictures
from vlm_dft.ranks import Ranks
from vlm_dft.run_dir import RunDir
from vlm_dft.trainer import train
from vlm_dft.vision_cache import VisionCache
from vlm_dft.vision_inputs import VisionInputs, takes_features


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "dataset", 7, masked=[1])


def trained(path: Path, model: Path, dataset: Path, **settings) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """metrics.jsonl without times, and the exported weights."""
    defaults = {"batch_size": 4, "micro_batch_size": 2, "n_epochs": 2, "learning_rate": 3e-3, "precision": "fp32"}
    defaults |= {"objective": {"name": "dft"}, "gradient_checkpointing": False, "validation_dataset": dataset}
    config = TrainConfig(model=str(model), dataset=dataset, **(defaults | settings))
    run = RunDir(path)
    run.create(RunConfig(run_id="test", train=config))
    train(config, run)
    return metrics_of(run.metrics_path), load_file(run.export_path / "model.safetensors")


def opened(model: Path, dataset: Path, directory: Path, **settings) -> tuple[LoadedModel, Corpus, Pictures]:
    kept = CacheConfig(directory=directory, **settings)
    config = config_of(model, dataset, "dft", freeze=FreezeConfig(), vision_cache=kept)
    loaded = loaded_for(config)
    pictures = Pictures(loaded, config, Ranks())
    corpus = open_corpus(dataset, Encoder(loaded.processor, config.pixels), config, model)
    return loaded, pictures.of(corpus), pictures


@pytest.mark.parametrize("layout", [{}, {"packing": True, "micro_batch_size": 1}], ids=["padded", "packed"])
def test_training_on_cached_features_is_bit_for_bit_training_on_files(
    layout: dict, tiny_vlm: Path, shapes: Path, tmp_path: Path
):
    expected, weights = trained(tmp_path / "files", tiny_vlm, shapes, **layout)
    assert len(expected) == 4 + 2
    kept = CacheConfig(directory=tmp_path / "cache")
    found, found_weights = trained(tmp_path / "cached", tiny_vlm, shapes, **layout, vision_cache=kept)
    assert found == expected
    assert all(torch.equal(found_weights[name], weights[name]) for name in weights)


def test_training_vision_too_on_cached_patches_is_bit_for_bit_training_on_files(
    tiny_vlm: Path, shapes: Path, tmp_path: Path
):
    freeze = FreezeConfig(vision_tower=False, merger=False)
    expected, weights = trained(tmp_path / "files", tiny_vlm, shapes, freeze=freeze)
    kept = CacheConfig(directory=tmp_path / "cache")
    found, found_weights = trained(tmp_path / "cached", tiny_vlm, shapes, freeze=freeze, patch_cache=kept)
    assert found == expected
    assert all(torch.equal(found_weights[name], weights[name]) for name in weights)


def test_loader_processes_read_and_write_the_cache_as_the_trainer_does(tiny_vlm: Path, shapes: Path, tmp_path: Path):
    seen = []
    for num_workers, cache in ((0, None), (1, tmp_path), (1, tmp_path), (0, tmp_path)):
        kept = CacheConfig(directory=cache) if cache else None
        config = config_of(tiny_vlm, shapes, "dft", patch_cache=kept)
        loaded = loaded_for(config)
        corpus = open_corpus(shapes, Encoder(loaded.processor, config.pixels), config, tiny_vlm)
        corpus = Pictures(loaded, config, Ranks()).of(corpus)
        plan = Plan(corpus.kept, 3, seed=0, epochs=2)
        steps = Steps(corpus, plan, micro_batch_size=2, pad_token_id=0, num_workers=num_workers)
        vision_inputs = VisionInputs(loaded.processor)
        seen.append([vision_inputs(micro_batch.inputs) for step in steps.read() for micro_batch in step])
    for other in seen[1:]:
        for found, expected in zip(other, seen[0], strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_training_needs_neither_images_nor_tower(
    tiny_vlm: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = shutil.copytree(shapes, tmp_path / "dataset")
    settings = {"adapter": LoraConfig(), "vision_cache": CacheConfig(directory=tmp_path / "cache"), "max_steps": 2}
    expected = trained(tmp_path / "first", tiny_vlm, dataset, **settings)
    shutil.rmtree(dataset / "images")
    monkeypatch.delattr(VisionCache, "_compute")
    found = trained(tmp_path / "second", tiny_vlm, dataset, **settings)
    assert found[0] == expected[0]
    with pytest.raises(DatasetError, match="cannot be read"):
        trained(tmp_path / "third", tiny_vlm, dataset, **(settings | {"vision_cache": None}))


def test_a_device_that_is_too_small_for_the_features_says_what_would_fit(
    tiny_vlm: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionCache, "_compute", full)
    with pytest.raises(OutOfMemoryError, match=r"ran out of memory; weights.* Try .*max_pixels"):
        trained(tmp_path, tiny_vlm, shapes, vision_cache=CacheConfig(directory=tmp_path / "cache"), max_steps=2)


def test_features_are_the_towers_and_do_not_depend_on_neighbours(tiny_vlm: Path, shapes: Path, tmp_path: Path):
    loaded, corpus, pictures = opened(tiny_vlm, shapes, tmp_path)
    pictures.prepare((corpus, Plan(corpus.kept, 4, seed=0)))
    rows = [row for row in corpus.dataset if row.images]
    samples = [corpus.encoder.encode(row, corpus.dataset) for row in rows]
    pixel_values, grid_I3 = (
        torch.cat([getattr(sample, name) for sample in samples]) for name in ("pixel_values", "image_grid_thw")
    )
    body = base_of(loaded.model).base_model
    with torch.no_grad():
        together = body.get_image_features(pixel_values, grid_I3).pooler_output
    assert corpus.pictures is not None
    for sample, features_MH in zip(samples, together, strict=True):
        found = corpus.pictures.attach(dataclasses.replace(sample, pixel_values=None)).image_features
        assert torch.equal(found, features_MH)


def test_only_the_pictures_of_planned_steps_are_computed(tiny_vlm: Path, shapes: Path, tmp_path: Path):
    _, corpus, pictures = opened(tiny_vlm, shapes, tmp_path)
    plan = Plan(corpus.kept, 2, seed=0, max_steps=1)
    pictures.prepare((corpus, plan))
    wanted = {part.sha256 for index in plan.batch(0) for part in corpus.rows[index].images}
    assert {path.name for path in tmp_path.rglob("*") if len(path.name) == 64} == wanted


@pytest.mark.parametrize("change", ["weights", "processor"])
def test_other_weights_and_other_processors_are_other_features(
    change: str, tiny_vlm: Path, shapes: Path, tmp_path: Path
):
    loaded, corpus, pictures = opened(tiny_vlm, shapes, tmp_path)
    pictures.prepare((corpus, Plan(corpus.kept, 4, seed=0)))
    if change == "weights":
        with torch.no_grad():
            base_of(loaded.model).base_model.visual.merger.mlp[0].bias[0] += 1e-3
    else:
        loaded.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    config = config_of(tiny_vlm, shapes, "dft", freeze=FreezeConfig(), vision_cache=CacheConfig(directory=tmp_path))
    sample = corpus.encoder.encode_tokens(corpus.rows[0])
    with pytest.raises(ConfigError, match=r"row test.jsonl:1: the features of image .* have gone"):
        VisionCache(loaded, config).attach(sample)


def test_the_budget_names_estimate_and_limit_before_anything_is_computed(tiny_vlm: Path, shapes: Path, tmp_path: Path):
    _, corpus, pictures = opened(tiny_vlm, shapes, tmp_path, max_gib=1e-6)
    with pytest.raises(ConfigError, match=r"vision features of \d+ images take .* GiB.*max_gib is 1e-06") as caught:
        pictures.prepare((corpus, Plan(corpus.kept, 4, seed=0)))
    assert caught.value.param == "train.vision_cache.max_gib"
    assert not [path for path in tmp_path.rglob("*") if len(path.name) == 64]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"freeze": FreezeConfig(vision_tower=False)}, "frozen vision tower and merger"),
        ({"freeze": FreezeConfig(merger=False)}, "frozen vision tower and merger"),
        ({"adapter": LoraConfig(targets="all")}, "adapter.targets"),
        ({"patch_cache": CacheConfig(directory=Path("patches"))}, "leave one out"),
    ],
)
def test_features_that_would_change_are_refused_by_the_config(settings: dict, reason: str, tmp_path: Path):
    with pytest.raises(ValidationError, match=reason):
        TrainConfig(model="m", dataset=tmp_path, vision_cache=CacheConfig(directory=tmp_path), **settings)


def test_a_text_model_has_no_features_to_keep(tiny_qwen2: Path, tmp_path: Path):
    config = config_of(tiny_qwen2, tmp_path, "dft", freeze=FreezeConfig(), vision_cache=CacheConfig(directory=tmp_path))
    with pytest.raises(ConfigError, match="has no vision tower"):
        VisionCache(loaded_for(config), config)


def test_a_tower_that_is_trained_after_all_is_refused(tiny_vlm: Path, tmp_path: Path):
    config = config_of(tiny_vlm, tmp_path, "dft", freeze=FreezeConfig(), vision_cache=CacheConfig(directory=tmp_path))
    loaded = loaded_for(config)
    base_of(loaded.model).base_model.visual.merger.requires_grad_(True)
    with pytest.raises(ConfigError, match="not trained"):
        VisionCache(loaded, config)


def test_a_transformers_without_precomputed_features_is_refused_by_name(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class OlderModel:
        def forward(self, input_ids, pixel_values=None): ...

    assert not takes_features(OlderModel())  # pyright: ignore[reportArgumentType]
    config = config_of(tiny_vlm, tmp_path, "dft", freeze=FreezeConfig(), vision_cache=CacheConfig(directory=tmp_path))
    loaded = loaded_for(config)
    assert takes_features(base_of(loaded.model))
    monkeypatch.setattr(vision_cache, "takes_features", lambda _: False)
    with pytest.raises(ConfigError, match=r"transformers 5.* takes no precomputed features"):
        VisionCache(loaded, config)
