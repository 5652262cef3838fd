"""Answers from a model: batched, left padded, greedy or sampled, each the same whatever it is batched with.

Nothing is taken from the model directory's generation_config.json but its end tokens: Qwen's asks for a repetition
penalty of 1.05, which nobody who reads a score expects. Sampling adds Gumbel noise from one generator per item and
takes the arg-max, which is a draw from softmax(logits / temperature): seeded by run and item, so that neither the batch
nor an interruption changes an answer.

Shape suffixes: B prompts of a batch, T padded tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlm_dft.config import GenerationSettings, PixelConfig
from vlm_dft.data.canonical import ImagePart, Message, TextPart
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.errors import DatasetError, EvaluationError, OutOfMemoryError
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.predictions import sample_id
from vlm_dft.model import LoadedModel, base_of


class Generated(NamedTuple):
    """One answer."""

    text: str
    finish_reason: Literal["stop", "length", "error"]
    num_tokens: int
    error: str | None = None


class Generator:
    """Asks one model under one set of settings."""

    def __init__(self, loaded: LoadedModel, settings: GenerationSettings, pixels: PixelConfig) -> None:
        self.loaded = loaded
        self.settings = settings
        self.encoder = Encoder(loaded.processor, pixels)
        self.end_token_ids = end_token_ids(loaded)
        # What generate() is not told it reads from here.
        base_of(loaded.model).generation_config = GenerationConfig()

    def answers(self, items: Sequence[Item], samples: Sequence[int] | None = None) -> list[Generated]:
        """One answer per item. An item that cannot be asked gets an error; a model that fails raises.

        samples: which sample of its item each answer is, 0 by default; it decides the seed where there is one.
        Raises BenchmarkError for a picture that cannot be decoded, OutOfMemoryError, EvaluationError.
        """
        prompts = {item.id: self.encoded(item) for item in items}
        encoded = [prompts[item.id] for item in items]
        if samples is not None:
            encoded = [
                replace(entry, row_id=sample_id(entry.row_id, sample)) if isinstance(entry, Sample) else entry
                for entry, sample in zip(encoded, samples, strict=True)
            ]
        asked = [sample for sample in encoded if isinstance(sample, Sample)]
        answered = iter(self._generated(asked) if asked else [])
        return [entry if isinstance(entry, Generated) else next(answered) for entry in encoded]

    def encoded(self, item: Item) -> Sample | Generated:
        """The item's prompt as tensors, or the answer that says why it cannot be asked."""
        image = item.picture.decoded() if item.picture else None
        parts: list[ImagePart | TextPart] = []
        if image is not None:
            parts.append(ImagePart(image="", sha256="", width=image.width, height=image.height))
        messages = [Message(role="user", content=(*parts, TextPart(text=item.prompt)))]
        if self.settings.system_prompt is not None:
            system = Message(role="system", content=(TextPart(text=self.settings.system_prompt),))
            messages.insert(0, system)
        try:
            sample = self.encoder.encode_prompt(messages, [image] if image is not None else [], row_id=item.id)
        except DatasetError as error:
            return Generated("", "error", 0, error.message)
        if self._room(sample) < 1:
            reason = f"the prompt has {len(sample)} tokens, the model's context {max_positions(self.loaded)}"
            return Generated("", "error", 0, f"{reason}: lower max_pixels")
        return sample

    def _room(self, sample: Sample) -> int:
        """Tokens that the answer may have."""
        return min(self.settings.max_new_tokens, max_positions(self.loaded) - len(sample))

    def _generated(self, samples: Sequence[Sample]) -> list[Generated]:
        batch = collate(samples, self.loaded.pad_token_id, side="left")
        batch.pop("labels")
        inputs = {name: tensor.to(self.loaded.device) for name, tensor in batch.items()}
        rooms = [self._room(sample) for sample in samples]
        config = GenerationConfig(
            max_new_tokens=max(rooms),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self.end_token_ids,
            pad_token_id=self.loaded.pad_token_id,
        )
        model: Any = base_of(self.loaded.model)  # PreTrainedModel's stub does not know generate
        try:
            with torch.no_grad():  # not inference_mode: what a model in training keeps must stay usable for it
                output_BT = model.generate(
                    **inputs, generation_config=config, logits_processor=self._processors(samples)
                )
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"no memory left to generate {len(samples)} answers at once: lower batch_size, max_new_tokens or "
                "max_pixels",
                param="evaluation.batch_size",
            ) from None
        assert isinstance(output_BT, Tensor)
        rows = output_BT[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._answer(row[:room]) for row, room in zip(rows, rooms, strict=True)]

    def _processors(self, samples: Sequence[Sample]) -> LogitsProcessorList:
        processors = LogitsProcessorList([BrokenModelCheck([sample.row_id for sample in samples])])
        if self.settings.temperature > 0:
            seeds = [item_seed(self.settings.seed, sample.row_id) for sample in samples]
            processors.append(GumbelNoise(seeds, self.settings.temperature, self.loaded.device))
        return processors

    def _answer(self, tokens: list[int]) -> Generated:
        """tokens: the answer, its end token, and padding where other answers were longer."""
        end = next((index for index, token in enumerate(tokens) if token in self.end_token_ids), None)
        kept = tokens if end is None else tokens[:end]
        text = self.loaded.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return Generated(text, "length" if end is None else "stop", len(kept) + (end is not None))


class BrokenModelCheck(LogitsProcessor):
    """Raises EvaluationError where a broken model would otherwise answer with its first token for ever."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self.item_ids = item_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken_B = scores.isnan().any(-1)
        if broken_B.any():
            item = self.item_ids[int(broken_B.int().argmax())]
            raise EvaluationError(f"the model computes values that are not numbers on item {item}: it is broken")
        return scores


class GumbelNoise(LogitsProcessor):
    """Makes the arg-max a draw from softmax(logits / temperature), each row from its own generator."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy_BV = scores.float() / self.temperature
        for row_V, generator in zip(noisy_BV, self.generators, strict=True):
            row_V -= torch.empty_like(row_V).exponential_(generator=generator).log()
        return noisy_BV


def item_seed(seed: int, item_id: str) -> int:
    """Seed of one item's generator."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{item_id}".encode()).digest()[:8], "big", signed=False) >> 1


def end_token_ids(loaded: LoadedModel) -> list[int]:
    """Tokens that end an answer: the chat template's end of turn, and what the model and the tokenizer declare."""
    declared = getattr(base_of(loaded.model).generation_config, "eos_token_id", None)
    found = [loaded.end_of_turn_token_id, loaded.tokenizer.eos_token_id]
    found += declared if isinstance(declared, list) else [declared]
    return sorted({token for token in found if isinstance(token, int)})


def max_positions(loaded: LoadedModel) -> int:
    """Longest sequence, prompt and answer together, that the model was made for."""
    return int(base_of(loaded.model).config.get_text_config().max_position_embeddings)
