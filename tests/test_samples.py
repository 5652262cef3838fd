"""Answers to rows of the data on the way: the right prompts, the model's own words, and no trace of having asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets_for_tests import metrics_of, picture_row, shapes_dataset, sums_dataset, text_row, write_dataset
from test_trainer import run_for

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from safetensors.torch import load_file

from vlm_dft import compilation, trainer
from vlm_dft.accuracy_probe import untouched
from vlm_dft.config import LoraConfig, TrainConfig
from vlm_dft.data.canonical import CanonicalDataset, Message, Row, TextPart
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.errors import DatasetError
from vlm_dft.evaluation.generation import end_token_ids
from vlm_dft.model import LoadedModel, load
from vlm_dft.results import SampleAnswer
from vlm_dft.run_dir import RunDir


def said(run: RunDir) -> list[SampleAnswer]:
    return [answer for step in run.sample_steps() for answer in run.read_samples(step)]


def turn(role: Any, *parts: Any, train: bool = True) -> Message:
    parts = tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts)
    return Message(role=role, content=parts, train=train)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One question; a chat about two pictures whose last turn is not trained; nothing to train."""
    path = tmp_path_factory.mktemp("chats") / "dataset"
    red, green = (picture_row(number, path, size=(56 + 28 * number, 56)).images[0] for number in range(2))
    chat = (
        turn("system", "Be brief."),
        turn("user", red, "Which colour?"),
        turn("assistant", "Red."),
        turn("user", "And here: ", green),
        turn("assistant", "Green."),
        turn("user", "Thanks!"),
        turn("assistant", "Bye.", train=False),
    )
    rows = [
        text_row(0, "What is 1 + 1?", "2", train=False),
        Row(id="test.jsonl:2", messages=chat),
        picture_row(2, path),
    ]
    return write_dataset(path, rows)


@pytest.mark.parametrize(
    "settings",
    [{"freeze": {"vision_tower": False, "merger": False}}, {"adapter": LoraConfig(r=2, dropout=0.5), "packing": True}],
)
def test_a_training_that_answers_rows_equals_one_that_does_not(
    settings: dict[str, Any], tiny_vlm: Path, tmp_path: Path
) -> None:
    dataset = shapes_dataset(tmp_path / "dataset", 6)
    runs = []
    for name, more in (("silent", {}), ("asked", {"sample_rows": 3, "sample_max_new_tokens": 4})):
        config, run = run_for(tmp_path / name, tiny_vlm, dataset, max_steps=3, probe_every_steps=2, **settings, **more)
        trainer.train(config, run)
        runs.append(run)
    silent, asked = runs
    assert said(silent) == []
    assert [(one.step, one.row_id) for one in said(asked)] == [
        (step, f"test.jsonl:{row}") for step in (0, 2, 3) for row in (1, 2, 3)
    ]
    assert metrics_of(asked.metrics_path) == metrics_of(silent.metrics_path)
    first, second = (load_file(run.export_path / "model.safetensors") for run in runs)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def generated(loaded: LoadedModel, sample: Sample, max_new_tokens: int) -> list[int]:
    """By transformers alone."""
    inputs = collate([sample], loaded.pad_token_id)
    length = inputs["input_ids"].shape[1]
    inputs.pop("labels")
    model: Any = loaded.model
    ends = end_token_ids(loaded)
    ids = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0, eos_token_id=ends
    )
    return ids[0, length:].tolist()


def test_a_chat_is_answered_where_its_last_trained_turn_begins_by_the_weights_of_that_step(
    chats: Path, tiny_vlm: Path, tmp_path: Path
) -> None:
    settings = {"validation_dataset": chats, "max_steps": 2, "learning_rate": 2e-2}
    more = {"sample_rows": 5, "sample_max_new_tokens": 6}
    config, run = run_for(tmp_path / "run", tiny_vlm, sums_dataset(tmp_path / "sums", 8), **settings, **more)
    trainer.train(config, run)
    before, after = run.read_samples(0), run.read_samples(2)
    rows = {row.id: row for row in CanonicalDataset.open(chats)}
    assert [(one.split, one.row_id) for one in before] == [("validation", f"test.jsonl:{row}") for row in (2, 3)]
    assert (before[0].prompt, before[0].reference) == (rows["test.jsonl:2"].messages[:4], "Green.")
    assert before[1].prompt == rows["test.jsonl:3"].messages[:1]
    for found, model in ((before, tiny_vlm), (after, run.export_path)):
        loaded = load(str(model), precision="fp32", device="cpu")
        encoder, dataset = Encoder(loaded.processor, config.pixels), CanonicalDataset.open(chats)
        for one in found:
            expected = generated(loaded, encoder.encode_turns(one.prompt, dataset, one.row_id), 6)
            ended = expected[-1] in end_token_ids(loaded)
            assert one.answer == loaded.tokenizer.decode(expected, skip_special_tokens=True)
            assert (one.num_tokens, one.finish_reason) == (len(expected), "stop" if ended else "length")
    assert [one.answer for one in before] != [one.answer for one in after]


def test_a_picture_that_has_changed_is_found_before_the_first_step(tiny_vlm: Path, tmp_path: Path) -> None:
    dataset = shapes_dataset(tmp_path / "dataset", 2)
    next((dataset / "images").iterdir()).write_bytes(b"another")
    config, run = run_for(tmp_path / "run", tiny_vlm, dataset, max_steps=1, sample_rows=2)
    with pytest.raises(DatasetError, match="changed since it was validated"):
        trainer.train(config, run)
    assert run.read_metrics() == said(run) == []


def test_models_cut_over_processes_are_not_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample_rows 4 need the whole model in each process"):
        TrainConfig(model="m", dataset=tmp_path, fsdp=True, sample_rows=4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_what_is_asked_on_the_way_compiles_nothing(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    loaded = load(str(tiny_qwen2), precision="fp32", device="cpu")
    model: Any = loaded.model
    compilation.compile_layers(model, loaded.device)
    ids_BT = torch.tensor([[1, 2, 3]])
    with untouched(loaded), torch.no_grad():
        expected = model(ids_BT).logits
    assert compiled == []
    with torch.no_grad():
        assert torch.allclose(model(ids_BT).logits, expected, atol=1e-5)
    assert compiled
