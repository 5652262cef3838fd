"""Estimates: tokens and steps are the trainer's own, memory is near measured peaks, and what is unknown says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, serve
from databases import copied_sqlite
from datasets_for_tests import shapes_dataset, text_row
from typer.testing import CliRunner

from benchmarks.calibration import memory
from cli.main import app
from service.jobs import store
from service.jobs.phases import Queue
from vlm_dft import head
from vlm_dft.batches import Corpus, Plan, Steps, open_corpus
from vlm_dft.config import FreezeConfig, FullConfig, LoraConfig, PixelConfig, TrainConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.encoding import Encoder
from vlm_dft.estimate_memory import _CHUNK_ELEMENTS, _SCRATCH_ELEMENTS, MemoryReckoning
from vlm_dft.estimate_rows import RowsReckoning, counted_now
from vlm_dft.heads import tile
from vlm_dft.model import adapt, load, load_processor
from vlm_dft.model_shape import read_shape

MEMORY_ERROR = 0.15
"""Largest relative error of the memory estimate against a measured peak on a CPU."""


@pytest.fixture(scope="module")
def encoder(tiny_vlm: Path) -> Encoder:
    return Encoder(load_processor(tiny_vlm, vision=True), PixelConfig())


def reckoned(tiny_vlm: Path, encoder: Encoder, path: Path, **settings: Any) -> tuple[RowsReckoning, Corpus]:
    """An estimate's view of a dataset, and the trainer's."""
    config = TrainConfig(model=str(tiny_vlm), dataset=path, on_overlong="drop", **settings)
    dataset = CanonicalDataset.open(path)
    rendered = [encoder.template.render(row) for row in dataset]
    text, supervised = [row.text_tokens for row in rendered], [row.supervised_tokens for row in rendered]
    return RowsReckoning(counted_now(dataset, text, supervised, ()), config), open_corpus(
        path, encoder, config, tiny_vlm
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4, "micro_batch_size": 3, "n_epochs": 2},
        {"batch_size": 5, "max_steps": 7, "max_length_tokens": 80},
        {"batch_size": 6, "packing": True, "pack_length_tokens": 200},
    ],
)
def test_rows_tokens_and_steps_are_those_that_the_trainer_makes(
    tiny_vlm: Path, encoder: Encoder, tmp_path: Path, settings: dict[str, Any]
) -> None:
    reckoning, corpus = reckoned(tiny_vlm, encoder, shapes_dataset(tmp_path, 11), **settings)
    config = reckoning.config
    plan = Plan(corpus.kept, config.batch_size, seed=1, epochs=config.n_epochs, max_steps=config.max_steps)
    rows, tokens, steps = reckoning.rows, reckoning.tokens, reckoning.steps
    assert (rows.total, rows.fit, rows.too_long) == (11, len(corpus.kept), corpus.dropped)
    assert tokens is not None
    assert tokens.total.total == sum(size.tokens for size in corpus.sizes.values()) == tokens.text + tokens.visual
    assert tokens.visual == sum(size.visual_tokens for size in corpus.sizes.values())
    assert (steps.per_epoch, steps.total) == (plan.steps_per_epoch, plan.total_steps)
    assert steps.samples == sum(len(plan.batch(step)) for step in range(plan.total_steps))
    if config.max_steps is None:
        assert steps.input_tokens == sum(corpus.sizes[i].tokens for s in range(plan.total_steps) for i in plan.batch(s))
    # No forward pass of the training is larger than the one that memory is reckoned for.
    most_tokens, most_visual = reckoning.largest_micro_batch()
    packing = config.pack_length is not None
    laid_out = Steps(
        corpus, plan, micro_batch_size=config.micro_batch_size, pad_token_id=0, pack_length=config.pack_length
    )
    for step in range(plan.total_steps):
        for indices in laid_out.layout(plan.batch(step)):
            lengths = [corpus.sizes[index].tokens for index in indices]
            assert (sum(lengths) if packing else len(lengths) * max(lengths)) <= most_tokens
            assert packing or sum(corpus.sizes[index].visual_tokens for index in indices) <= most_visual


def test_rows_that_do_not_fit_are_named(tiny_vlm: Path, encoder: Encoder, tmp_path: Path) -> None:
    reckoning, corpus = reckoned(tiny_vlm, encoder, shapes_dataset(tmp_path, 8), max_length_tokens=80)
    named = {f"{row.file}:{row.line}" for row in reckoning.rows.too_long_rows}
    assert named == {corpus.rows[index].id for index in range(8) if index not in corpus.kept}
    assert named


def test_the_pixel_table_has_the_asked_limits_and_grows_with_them(
    tiny_vlm: Path, encoder: Encoder, tmp_path: Path
) -> None:
    reckoning, _ = reckoned(tiny_vlm, encoder, shapes_dataset(tmp_path, 8))
    table = reckoning.pixel_choices()
    (asked,) = [choice for choice in table if choice.is_asked]
    assert reckoning.tokens is not None
    assert asked.visual_tokens == reckoning.tokens.visual
    # Small pictures grow with min_pixels.
    visual = {choice.min_pixels: choice.visual_tokens or 0 for choice in table}
    assert visual[256 * 784] > visual[4 * 784] > 0


@pytest.mark.parametrize(
    ("adapter", "freeze"),
    [
        (FullConfig(), FreezeConfig()),
        (FullConfig(), FreezeConfig(vision_tower=False, merger=False)),
        (FullConfig(), FreezeConfig(language_model=True, merger=False)),
        (LoraConfig(r=4), FreezeConfig()),
        (LoraConfig(r=3, targets="all"), FreezeConfig()),
    ],
)
def test_parameters_are_counted_as_the_model_has_them(
    tiny_vlm: Path, adapter: FullConfig | LoraConfig, freeze: FreezeConfig
) -> None:
    loaded = load(tiny_vlm, precision="fp32", device="cpu")
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    model = adapt(loaded.model, adapter, freeze, 0)  # pyright: ignore[reportArgumentType]
    config = TrainConfig(model=str(tiny_vlm), dataset=tiny_vlm, adapter=adapter, freeze=freeze)
    found = MemoryReckoning(read_shape(tiny_vlm), config, on_gpu=False).estimate(100, 0)
    assert found.parameters == total
    assert found.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_arithmetic_knows_about_how_large_the_heads_chunks_are() -> None:
    chunks = {"cpu": head._CHUNK_ELEMENTS_CPU, "cuda": head._CHUNK_ELEMENTS_GPU}
    scratch = {"cpu": tile._SCRATCH_ELEMENTS_CPU, "cuda": tile._SCRATCH_ELEMENTS_GPU}
    for device in ("cpu", "cuda"):
        assert 0.5 <= _CHUNK_ELEMENTS[device] / chunks[device] <= 2
        assert 0.5 <= _SCRATCH_ELEMENTS[device] / scratch[device] <= 2


def test_memory_is_within_the_stated_error_of_five_measured_peaks() -> None:
    rows = json.loads(memory.FIGURES.read_text())
    assert [row["configuration"] for row in rows] == list(memory.CONFIGURATIONS)
    for row in rows:
        assert row["error"] == pytest.approx(row["estimated_mib"] / row["measured_mib"] - 1, abs=0.01)
        assert abs(row["error"]) <= MEMORY_ERROR, row


def test_a_peak_measured_now_is_within_the_stated_error(tmp_path: Path) -> None:
    memory.prepare(tmp_path, num_layers=3)
    row = memory.measure(tmp_path, "full, vision frozen, no checkpointing")
    assert abs(row["error"]) <= MEMORY_ERROR, row


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest, tiny_vlm: Path) -> Iterator[Api]:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_vlm, target_is_directory=True)
    with serve(tmp_path, url) as running:
        yield running


def counted_row(number: int, tokens: int) -> Any:
    row = text_row(number, "What is 1 + 1?", "2")
    return row.model_copy(update={"text_tokens": tokens, "supervised_tokens": 2})


def test_an_estimate_counts_rows_that_a_job_refuses(api: Api) -> None:
    client = api.client()
    file_id = api.ready_file(client, [counted_row(0, 40), counted_row(1, 50), counted_row(2, 500)])
    numbers = {"batch_size": 1, "n_epochs": 3, "max_length_tokens": 100}
    body = {
        "model": "tiny",
        "training_file": file_id,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
    }
    found: Any = client.post("/fine_tuning/estimates", cast_to=object, body=body)
    assert (found["rows"]["fit"], found["rows"]["too_long"], found["rows"]["on_overlong"]) == (2, 1, "error")
    assert found["rows"]["too_long_rows"][0]["line"] == 3
    assert found["tokens"]["text"] == 90
    assert (found["steps"]["total"], found["steps"]["input_tokens"]) == (6, 270)
    assert found["memory"]["largest_micro_batch_tokens"] == 50
    assert found["notes"] == []
    numbers |= {"max_steps": 1}
    assert "at 0: set warmup_ratio" in client.post("/fine_tuning/estimates", cast_to=object, body=body)["notes"][0]
    assert found["time"]["seconds"] is None
    assert "no finished job" in found["time"]["basis"]
    assert found["queue"]["seconds"] is None
    assert "no worker is alive" in found["queue"]["basis"]
    assert client.fine_tuning.jobs.list().data == []


def test_time_comes_from_finished_jobs_and_devices_from_workers(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    client = api.client()
    file_id = api.ready_file(client, [counted_row(0, 40), counted_row(1, 50)])
    body = {"model": "tiny", "training_file": file_id}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    claim = api.claim(job.id)
    waits: Any = client.post("/fine_tuning/estimates", cast_to=object, body=body)
    assert waits["time"]["num_jobs"] == 0
    result = store_result(input_tokens=900, wall_seconds=10.0)
    api.finish(claim, train=result)
    gpu = {"name": "NVIDIA H100", "memory_total_gib": 79.6}
    with api.database.write() as s:
        store.register_worker(
            s,
            "host:gpu:1",
            host="host",
            queue=Queue.GPU,
            pid=1,
            devices=[gpu, gpu, {**gpu, "name": "small", "memory_total_gib": 0.01}],
            versions={},
        )
    found: Any = client.post("/fine_tuning/estimates", cast_to=object, body=body)
    assert found["time"]["tokens_per_second"] == 90
    assert found["time"]["seconds"] == found["steps"]["input_tokens"] / 90 == 1
    fits = {device["name"]: (device["count"], device["fits"]) for device in found["devices"]}
    assert fits == {"NVIDIA H100": (2, True), "small": (1, False)}
    assert found["memory"]["precision"] == "bf16"
    assert found["queue"]["seconds"] == 0
    monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
    printed = CliRunner().invoke(app, ["estimate", file_id, "--model", "tiny"]).stdout
    assert "2 of 2 fit" in printed
    assert "does not fit" in printed


def store_result(**fields: Any) -> Any:
    from store_samples import trained

    train = trained().train
    assert train is not None
    return train.model_copy(update=fields)
