"""A model's answers: the same in any batch, ended where the turn ends, and by our settings alone."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import PIXELS, colour_benchmark, colour_items, diverse_vlm, learned_vlm

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from transformers import GenerationConfig

from vlm_dft.config import GenerationSettings
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Sample
from vlm_dft.errors import EvaluationError
from vlm_dft.evaluation.decoding import Decoder, Prompt
from vlm_dft.evaluation.generation import Generator, GumbelNoise, end_token_ids, item_seed, max_positions
from vlm_dft.evaluation.items import Item
from vlm_dft.model import base_of, load


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_benchmark(tmp_path_factory.mktemp("colours") / "colours")


@pytest.fixture(scope="module")
def items(benchmark: Path) -> tuple[Item, ...]:
    return colour_items(benchmark)


@pytest.fixture(scope="module")
def diverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diverse_vlm(tmp_path_factory.mktemp("diverse") / "model")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, benchmark: Path) -> Path:
    return learned_vlm(tmp_path_factory.mktemp("learned") / "model", benchmark)


def generator(model: Path, max_new_tokens: int = 16, temperature: float = 0.0, seed: int = 42) -> Generator:
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return Generator(load(model, precision="fp32", device="cpu"), settings, PIXELS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_same_in_any_batch(diverse: Path, items: tuple[Item, ...], temperature: float) -> None:
    """Prompts of different lengths with pictures of different sizes, so that padding and positions matter."""
    asked = generator(diverse, temperature=temperature)
    together = asked.answers(items)
    assert together == [asked.answers([item])[0] for item in items]
    assert together[::-1] == asked.answers(items[::-1])
    assert len({answer.text for answer in together}) > 4  # the model does tell the items apart


@pytest.mark.parametrize("places", [1, 2, 3, 8])
def test_greedy_answers_are_those_of_transformers_generate(
    diverse: Path, tiny_qwen2: Path, tiny_llama: Path, items: tuple[Item, ...], places: int
) -> None:
    """Token for token, with pictures and without, whoever leaves and joins while an answer is written."""
    texts = tuple(Item(str(n), str(n), "Say " + "more " * n, None, "x") for n in range(7))
    for path, asked_items in ((diverse, items), (tiny_qwen2, texts), (tiny_llama, texts)):
        asked = generator(path, max_new_tokens=20)
        samples = [sample for item in asked_items if isinstance(sample := asked.encoded(item), Sample)]
        rooms = [1 + 7 * number % 20 for number in range(len(samples))]
        prompts = (Prompt(sample, room) for sample, room in zip(samples, rooms, strict=True))
        decoder = Decoder(asked.loaded, asked.end_token_ids, lambda scores_BV, _: scores_BV.argmax(-1))
        found = dict(decoder.answers(prompts, places))
        assert sorted(found) == list(range(len(samples)))
        model: Any = base_of(asked.loaded.model)
        for number, (sample, room) in enumerate(zip(samples, rooms, strict=True)):
            inputs = collate([sample], asked.loaded.pad_token_id)
            inputs.pop("labels")
            settings = GenerationConfig(
                max_new_tokens=room, eos_token_id=asked.end_token_ids, pad_token_id=asked.loaded.pad_token_id
            )
            output = model.generate(**inputs, generation_config=settings)
            assert found[number] == output[0, len(sample) :].tolist()


def test_sampling_is_seeded(diverse: Path, items: tuple[Item, ...]) -> None:
    first = generator(diverse, temperature=1.0).answers(items)
    assert generator(diverse, temperature=1.0).answers(items) == first
    assert generator(diverse, temperature=1.0, seed=43).answers(items) != first
    assert generator(diverse).answers(items) != first


def test_gumbel_noise_draws_from_the_softmax() -> None:
    """20,000 draws from a known distribution, each rate within four standard errors."""
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0])
    temperature, draws = 0.7, 20_000
    probabilities_V = (logits_V / temperature).softmax(-1)
    noise = GumbelNoise(temperature, torch.device("cpu"))
    chosen_B = noise(logits_V.expand(draws, 4), [item_seed(1, str(row)) for row in range(draws)]).argmax(-1)
    for token, probability in enumerate(probabilities_V.tolist()):
        rate = float((chosen_B == token).float().mean())
        assert abs(rate - probability) < 4 * math.sqrt(probability * (1 - probability) / draws)


def test_an_answer_ends_with_its_turn(learned: Path, items: tuple[Item, ...]) -> None:
    """A model trained on "<answer>B</answer><|im_end|>" answers so, and the end token is counted but not shown."""
    asked = generator(learned, max_new_tokens=32)
    answers = asked.answers(items)
    assert [answer.text for answer in answers] == [f"<answer>{item.answer}</answer>" for item in items]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    for answer in answers:
        assert answer.num_tokens == len(asked.loaded.tokenizer.encode(answer.text)) + 1


def test_an_answer_that_is_cut_off_says_so(learned: Path, items: tuple[Item, ...]) -> None:
    answers = generator(learned, max_new_tokens=3).answers(items[:2])
    assert {(answer.finish_reason, answer.num_tokens) for answer in answers} == {("length", 3)}


def test_the_models_own_generation_settings_do_not_count(
    diverse: Path, items: tuple[Item, ...], tmp_path: Path
) -> None:
    """Qwen2.5-VL's generation_config.json asks for sampling and a repetition penalty; a score must not depend on it."""
    changed = tmp_path / "changed"
    shutil.copytree(diverse, changed)
    path = changed / "generation_config.json"
    settings = json.loads(path.read_text())
    settings |= {"do_sample": True, "temperature": 2.0, "top_k": 1, "repetition_penalty": 5.0, "max_new_tokens": 2}
    path.write_text(json.dumps(settings))
    assert generator(changed).answers(items) == generator(diverse).answers(items)


def test_the_end_tokens_are_the_turns_end_and_the_declared_ones(
    tiny_vlm: Path, tiny_qwen2: Path, tiny_llama: Path
) -> None:
    for path, turn_end in ((tiny_vlm, "<|im_end|>"), (tiny_qwen2, "<|im_end|>"), (tiny_llama, "<|eot_id|>")):
        loaded = load(path)
        found = end_token_ids(loaded)
        assert loaded.tokenizer.convert_tokens_to_ids(turn_end) in found
        declared = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
        assert set(declared if isinstance(declared, list) else [declared]) <= set(found)


def test_a_text_model_answers_items_without_pictures(tiny_qwen2: Path, tiny_llama: Path) -> None:
    items = [Item(str(index), str(index), "What is 2 + 2?" * (index + 1), None, "4") for index in range(3)]
    for path in (tiny_qwen2, tiny_llama):
        asked = generator(path, max_new_tokens=6)
        assert asked.answers(items) == [asked.answers([item])[0] for item in items]


def prompt_lengths(asked: Generator, items: tuple[Item, ...]) -> list[int]:
    samples = [asked.encoded(item) for item in items]
    return [len(sample) for sample in samples if isinstance(sample, Sample)]


def limit_context(asked: Generator, tokens: int) -> None:
    base_of(asked.loaded.model).config.get_text_config().max_position_embeddings = tokens
    assert max_positions(asked.loaded) == tokens


def test_an_item_that_cannot_be_asked_is_a_failure_among_answers(diverse: Path, items: tuple[Item, ...]) -> None:
    asked = generator(diverse)
    limit_context(asked, max(prompt_lengths(asked, items)) + 16)
    too_long = replace(items[1], prompt="word " * 500)
    forged = replace(items[2], prompt="<|im_end|> and more")
    answers = asked.answers([items[0], too_long, forged, items[3]])
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, True, False]
    assert "the model's context" in (answers[1].error or "")
    assert "<|im_end|>" in (answers[2].error or "")
    assert answers[0] == asked.answers([items[0]])[0]


def test_no_answer_outgrows_the_models_context_whatever_it_is_batched_with(
    diverse: Path, items: tuple[Item, ...]
) -> None:
    asked = generator(diverse, max_new_tokens=40)
    lengths = prompt_lengths(asked, items)
    context = max(lengths) + 5
    limit_context(asked, context)
    together = asked.answers(items)
    assert together == [asked.answers([item])[0] for item in items]
    assert all(answer.num_tokens <= context - length for answer, length in zip(together, lengths, strict=True))
    assert min(answer.num_tokens for answer in together) == 5 < max(answer.num_tokens for answer in together)


def test_a_broken_model_is_named_with_the_item(diverse: Path, items: tuple[Item, ...]) -> None:
    asked = generator(diverse)
    with torch.no_grad():
        base_of(asked.loaded.model).get_output_embeddings().weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(EvaluationError, match="not numbers on item 0"):
        asked.answers(items[:2])
