"""Answers from a model: batched, left padded, greedy or sampled, each the same whatever it is batched with.

Nothing is taken from the model directory's generation_config.json but its end tokens: Qwen's asks for a repetition
penalty of 1.05, which nobody who reads a score expects. Sampling adds Gumbel noise from one generator per item and
takes the arg-max, which is a draw from softmax(logits / temperature): seeded by run and item, so that neither the batch
nor an interruption changes an answer.

Shape suffixes: B prompts of a batch, T padded tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor

from vlm_dft.config import GenerationSettings, PixelConfig
from vlm_dft.data.canonical import ImagePart, Message, TextPart
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.errors import DatasetError, EvaluationError, OutOfMemoryError
from vlm_dft.evaluation.decoding import Choose, Decoder, Prompt
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

    def answers(self, items: Sequence[Item], samples: Sequence[int] | None = None) -> list[Generated]:
        """One answer per item, in their order; see stream."""
        found = dict(self.stream(items, samples))
        return [found[index] for index in range(len(items))]

    def stream(self, items: Sequence[Item], samples: Sequence[int] | None = None) -> Iterator[tuple[int, Generated]]:
        """(index of the item, answer), as answers end; batch_size are written at once.

        An item that cannot be asked gets an error; a model that fails raises. samples: which sample of its item each
        answer is, 0 by default; it decides the seed where there is one.
        Raises BenchmarkError for a picture that cannot be decoded, OutOfMemoryError, EvaluationError.
        """
        names = [sample_id(item.id, sample) for item, sample in zip(items, samples or [0] * len(items), strict=True)]
        return self._stream(names, self._each_once(items))

    def answers_to(self, prompts: Sequence[Sample]) -> list[Generated]:
        """The same for prompts that are encoded already, each of a name of its own."""
        found = dict(self._stream([prompt.row_id for prompt in prompts], map(self._fitting, prompts)))
        return [found[index] for index in range(len(prompts))]

    def _each_once(self, items: Sequence[Item]) -> Iterator[Sample | Generated]:
        last: tuple[str, Sample | Generated] | None = None
        for item in items:
            if last is None or last[0] != item.id:  # several samples of one item follow each other
                last = item.id, self.encoded(item)
            yield last[1]

    def _stream(self, names: Sequence[str], entries: Iterable[Sample | Generated]) -> Iterator[tuple[int, Generated]]:
        refused: list[tuple[int, Generated]] = []
        asked: list[int] = []

        def prompts() -> Iterator[Prompt]:
            for index, entry in enumerate(entries):
                if isinstance(entry, Generated):
                    refused.append((index, entry))
                else:
                    asked.append(index)
                    yield Prompt(entry, self._room(entry))

        decoder = Decoder(self.loaded, self.end_token_ids, self._choose(names, asked))
        try:
            for number, tokens in decoder.answers(prompts(), self.settings.batch_size):
                yield asked[number], self._answer(tokens)
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"no memory left to generate {self.settings.batch_size} answers at once: lower batch_size, "
                "max_new_tokens or max_pixels",
                param="evaluation.batch_size",
            ) from None
        yield from refused

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
        return self._fitting(sample)

    def _fitting(self, sample: Sample) -> Sample | Generated:
        if self._room(sample) < 1:
            reason = f"the prompt has {len(sample)} tokens, the model's context {max_positions(self.loaded)}"
            return Generated("", "error", 0, f"{reason}: lower max_pixels")
        return sample

    def _room(self, sample: Sample) -> int:
        """Tokens that the answer may have."""
        return min(self.settings.max_new_tokens, max_positions(self.loaded) - len(sample))

    def _choose(self, names: Sequence[str], asked: Sequence[int]) -> Choose:
        """The arg-max of the scores, or of a draw. Raises EvaluationError where a broken model has no arg-max."""
        noise = GumbelNoise(self.settings.temperature, self.loaded.device)

        def choose(scores_BV: Tensor, numbers: Sequence[int]) -> Tensor:
            rows = [names[asked[number]] for number in numbers]
            broken_B = scores_BV.isnan().any(-1)
            if broken_B.any():
                name = rows[int(broken_B.int().argmax())]
                raise EvaluationError(f"the model computes values that are not numbers on item {name}: it is broken")
            if self.settings.temperature > 0:
                scores_BV = noise(scores_BV, [item_seed(self.settings.seed, name) for name in rows])
            return scores_BV.argmax(-1)

        return choose

    def _answer(self, tokens: list[int]) -> Generated:
        """tokens: the answer with its end token, if it came to one."""
        ended = tokens[-1] in self.end_token_ids
        kept = tokens[:-1] if ended else tokens
        text = self.loaded.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return Generated(text, "stop" if ended else "length", len(tokens))


class GumbelNoise:
    """Makes the arg-max a draw from softmax(scores / temperature), each prompt from a generator of its own."""

    def __init__(self, temperature: float, device: torch.device) -> None:
        self.temperature, self.device = temperature, device
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, scores_BV: Tensor, seeds: Sequence[int]) -> Tensor:
        """seeds: of each row's prompt; a seed that was seen before goes on where it was."""
        noisy_BV = scores_BV / self.temperature
        for row_V, seed in zip(noisy_BV, seeds, strict=True):
            if seed not in self._generators:
                self._generators[seed] = torch.Generator(self.device).manual_seed(seed)
            row_V -= torch.empty_like(row_V).exponential_(generator=self._generators[seed]).log()
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
