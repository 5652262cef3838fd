"""Tokens from a model for many prompts, so many at once: one that has its answer leaves, and another takes its place.

transformers' generate carries finished rows along until the longest answer ends, and of answers as unequal as real
ones that is most of the work. Here each step computes the rows that still write, and free places are filled again.
Positions are the model's own (``vlm_dft.data.collate``), so that padding, batch and neighbours change no answer but by
rounding. Knows nothing about items, texts or seeds.

Shape suffixes: B rows that write, T padded tokens, R position rows (1 for text, 3 for vision), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from vlm_dft.data.collate import collate, positions_4T
from vlm_dft.data.encoding import Sample
from vlm_dft.model import LoadedModel, base_of

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""(scores_BV as float32, the prompts' numbers) -> the next token of each."""
REFILL_SHARE = 4
"""Places are filled when a quarter of them is free: each time costs a copy of the cache."""


class Prompt(NamedTuple):
    """What is to be answered, and how many tokens the answer may have, at least one."""

    sample: Sample
    room: int


@dataclass
class _Rows:
    """Prompts that are being answered: their last token is chosen, and not in the cache yet."""

    numbers: list[int]
    tokens_B: Tensor
    mask_BT: Tensor
    """Of the cache: 0 where another row is longer."""
    next_RB: Tensor
    """Position of the last token."""
    cache: DynamicCache

    def keep(self, kept: Tensor) -> None:
        """kept: indices of the rows that stay. Columns that nobody has any more go with the others."""
        self.numbers = [self.numbers[index] for index in kept.tolist()]
        self.tokens_B, self.next_RB = self.tokens_B[kept], self.next_RB[:, kept]
        first = int(self.mask_BT[kept].any(dim=0).int().argmax())
        self.mask_BT = self.mask_BT[kept, first:]
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[kept, :, first:], layer.values[kept, :, first:]

    def join(self, other: _Rows) -> None:
        """Take in the rows of other, the shorter of both padded on the left."""
        length, others = self.mask_BT.shape[1], other.mask_BT.shape[1]
        longest = max(length, others)
        self.numbers += other.numbers
        self.tokens_B = torch.cat([self.tokens_B, other.tokens_B])
        self.next_RB = torch.cat([self.next_RB, other.next_RB], dim=1)
        self.mask_BT = torch.cat([pad(self.mask_BT, (longest - length, 0)), pad(other.mask_BT, (longest - others, 0))])
        layers: list[tuple[Any, Any]] = list(zip(self.cache.layers, other.cache.layers, strict=True))
        for ours, theirs in layers:
            for name in ("keys", "values"):
                first, second = getattr(ours, name), getattr(theirs, name)
                both = [pad(first, (0, 0, longest - length, 0)), pad(second, (0, 0, longest - others, 0))]
                setattr(ours, name, torch.cat(both))


class Decoder:
    """One model and one way to choose tokens."""

    def __init__(self, loaded: LoadedModel, end_token_ids: Sequence[int], choose: Choose) -> None:
        self._loaded = loaded
        self._model: Any = base_of(loaded.model)
        self._ends = frozenset(end_token_ids)
        self._choose = choose
        self._answers: dict[int, list[int]] = {}
        self._rooms: dict[int, int] = {}

    @torch.no_grad()  # not inference_mode: what a model in training keeps must stay usable for it
    def answers(self, prompts: Iterator[Prompt], places: int) -> Iterator[tuple[int, list[int]]]:
        """(number of the prompt, tokens of its answer with the end token), as they end; places: how many at once.

        Prompts are taken when there is place for them.
        """
        numbered = enumerate(prompts)
        rows: _Rows | None = None
        while True:
            free = places - (len(rows.numbers) if rows else 0)
            group = list(islice(numbered, free)) if rows is None or free * REFILL_SHARE >= places else []
            if group:
                begun, scores_BV = self._begin(group)
                yield from self._advance(begun, scores_BV)
                if rows is None:
                    rows = begun if begun.numbers else None
                elif begun.numbers:
                    rows.join(begun)
                continue
            if rows is None:
                return
            yield from self._advance(rows, self._step(rows))
            rows = rows if rows.numbers else None

    def _begin(self, group: Sequence[tuple[int, Prompt]]) -> tuple[_Rows, Tensor]:
        """The prompts in the cache, and the scores of their first tokens."""
        samples = [prompt.sample for _, prompt in group]
        for number, prompt in group:
            self._answers[number], self._rooms[number] = [], prompt.room
        batch = collate(samples, self._loaded.pad_token_id, side="left")
        batch.pop("labels")
        inputs = {name: tensor.to(self._loaded.device) for name, tensor in batch.items()}
        positions_RBT = _positions(samples, self._loaded.is_vision).to(self._loaded.device)
        cache = DynamicCache(config=self._model.config.get_text_config())
        scores_BV = self._scores(cache, positions_RBT, **inputs)
        last_RB = positions_RBT.amax(dim=(0, 2)).expand(len(positions_RBT), -1)  # after the largest of all three
        numbers = [number for number, _ in group]
        return _Rows(numbers, scores_BV.new_zeros(0), inputs["attention_mask"], last_RB, cache), scores_BV

    def _step(self, rows: _Rows) -> Tensor:
        """Put the last tokens into the cache; scores of the next ones."""
        rows.mask_BT = torch.cat([rows.mask_BT, rows.mask_BT.new_ones(len(rows.numbers), 1)], dim=1)
        return self._scores(
            rows.cache, rows.next_RB[..., None], input_ids=rows.tokens_B[:, None], attention_mask=rows.mask_BT
        )

    def _scores(self, cache: DynamicCache, positions_RBT: Tensor, **inputs: Tensor) -> Tensor:
        position_ids = positions_RBT if self._loaded.is_vision else positions_RBT[0]
        output = self._model(
            **inputs, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1].float()

    def _advance(self, rows: _Rows, scores_BV: Tensor) -> Iterator[tuple[int, list[int]]]:
        """Choose a token per row; yield the answers that it ends, and keep the other rows."""
        rows.tokens_B, rows.next_RB = self._choose(scores_BV, rows.numbers), rows.next_RB + 1
        kept, ended = [], []
        for index, (number, token) in enumerate(zip(rows.numbers, rows.tokens_B.tolist(), strict=True)):
            self._answers[number].append(token)
            over = token in self._ends or len(self._answers[number]) == self._rooms[number]
            (ended if over else kept).append(index)
        numbers = [rows.numbers[index] for index in ended]
        if ended and kept:
            rows.keep(torch.tensor(kept, device=rows.tokens_B.device))
        elif ended:
            rows.numbers = []
        for number in numbers:
            del self._rooms[number]
            yield number, self._answers.pop(number)


def _positions(samples: Sequence[Sample], is_vision: bool) -> Tensor:
    """R x B x T, padded on the left; padding is masked, whatever its position."""
    rows = [positions_4T(sample)[1:] if is_vision else torch.arange(len(sample))[None] for sample in samples]
    longest = max(len(sample) for sample in samples)
    return torch.stack([pad(row, (longest - row.shape[1], 0)) for row in rows], dim=1)
