"""How many tokens and steps a training has: exact, from the canonical dataset and image sizes. Torch-free.

Knows nothing about models, but for the text tokens that the caller may have counted for one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from vlm_dft.config import TrainConfig
from vlm_dft.data.canonical import ROWS_NAME, CanonicalDataset
from vlm_dft.data.pixels import num_visual_tokens
from vlm_dft.data.tokens import overlong
from vlm_dft.errors import DatasetError
from vlm_dft.estimate_report import PixelChoice, RowsEstimate, StepsEstimate, TokensEstimate
from vlm_dft.pixel_config import PixelConfig
from vlm_dft.results import Distribution, RowProblem

NAMED_ROWS: Final = 100
_TOKEN_PIXELS: Final = 28 * 28
_MIN_CHOICES: Final = (4, 256)
_MAX_CHOICES: Final = (256, 512, 1024, 1280, 2048, 4096, 16384)
"""Of the table, in visual tokens."""


@dataclass(frozen=True)
class RowSize:
    """What decides a row's length."""

    id: str
    text_tokens: int
    supervised_tokens: int | None
    images: tuple[tuple[int, int], ...]
    """Width and height of each."""


@dataclass(frozen=True)
class Counted:
    """Text tokens of every row, as the model's tokenizer counts them."""

    rows: tuple[RowSize, ...]
    refused: tuple[str, ...] = ()
    """Rows that the chat template cannot take, and why; the first ones."""
    num_refused: int = 0
    basis: str = "counted by the file's validation, with the model's own tokenizer"


def counted_by_validation(dataset: CanonicalDataset) -> Counted:
    """Raises DatasetError when validation had no tokenizer."""
    rows = []
    for row_id, text, supervised, images in _raw(dataset):
        if text is None:
            raise DatasetError(f"{row_id} has no token count: its file was validated without a tokenizer")
        rows.append(RowSize(row_id, text, supervised, images))
    return Counted(tuple(rows))


def counted_now(
    dataset: CanonicalDataset,
    text_tokens: Sequence[int | None],
    supervised_tokens: Sequence[int | None],
    refused: Sequence[str],
) -> Counted:
    """With counts of another tokenizer than validation's; None: the chat template refuses the row."""
    rows = [
        RowSize(row_id, text, supervised, images)
        for (row_id, _, _, images), text, supervised in zip(_raw(dataset), text_tokens, supervised_tokens, strict=True)
        if text is not None
    ]
    return Counted(
        tuple(rows),
        tuple(refused),
        num_refused=len(text_tokens) - len(rows),
        basis="counted now, with the model's own tokenizer",
    )


def _raw(dataset: CanonicalDataset) -> Iterator[tuple[str, int | None, int | None, tuple[tuple[int, int], ...]]]:
    # Not through pydantic: a client waits for this, and a large dataset has 100,000 rows.
    with (dataset.path / ROWS_NAME).open("rb") as file:
        for line in file:
            row = json.loads(line)
            parts = (part for message in row["messages"] for part in message["content"])
            images = tuple((part["width"], part["height"]) for part in parts if part["type"] == "image")
            yield row["id"], row["text_tokens"], row["supervised_tokens"], images


class RowsReckoning:
    """One dataset under the settings of one training."""

    def __init__(self, counted: Counted, config: TrainConfig) -> None:
        """Raises DatasetError for an image that cannot be resized under the pixel limits."""
        self.counted, self.config = counted, config
        self.limit = min(config.max_length_tokens, config.pack_length or config.max_length_tokens)
        self._visual = [_visual_tokens(row, config.pixels) for row in counted.rows]
        totals = [row.text_tokens + visual for row, visual in zip(counted.rows, self._visual, strict=True)]
        self._fitting = [index for index, total in enumerate(totals) if total <= self.limit]
        self._totals = totals

    @property
    def rows(self) -> RowsEstimate:
        counted = self.counted
        too_long = [index for index, total in enumerate(self._totals) if total > self.limit]
        listed: list[RowProblem] = [
            overlong(counted.rows[index].id, self._totals[index], self.limit) for index in too_long[:NAMED_ROWS]
        ]
        return RowsEstimate(
            total=len(counted.rows) + counted.num_refused,
            fit=len(self._fitting),
            too_long=len(too_long),
            too_long_rows=tuple(listed),
            refused=counted.num_refused,
            refused_rows=counted.refused,
            limit_tokens=self.limit,
            on_overlong=self.config.on_overlong,
        )

    @property
    def tokens(self) -> TokensEstimate | None:
        """None when no row fits."""
        if not self._fitting:
            return None
        rows = [self.counted.rows[index] for index in self._fitting]
        supervised = [row.supervised_tokens for row in rows]
        return TokensEstimate(
            text=sum(row.text_tokens for row in rows),
            visual=sum(self._visual[index] for index in self._fitting),
            supervised=None if None in supervised else sum(filter(None, supervised)),
            total=Distribution.of([self._totals[index] for index in self._fitting]),
            images=sum(len(row.images) for row in rows),
            basis=self.counted.basis,
        )

    @property
    def steps(self) -> StepsEstimate:
        """As the trainer plans them: the last batch of an epoch is as small as what is left."""
        config, fit = self.config, len(self._fitting)
        per_epoch = -(-fit // config.batch_size)
        total = 0 if not fit else (config.max_steps or config.n_epochs * per_epoch)
        epochs, rest = divmod(total, per_epoch) if per_epoch else (0, 0)
        tokens = sum(self._totals[index] for index in self._fitting)
        samples = epochs * fit + min(rest * config.batch_size, fit)
        return StepsEstimate(
            per_epoch=per_epoch,
            total=total,
            samples=samples,
            input_tokens=epochs * tokens + (round(tokens * (samples - epochs * fit) / fit) if rest else 0),
        )

    def largest_micro_batch(self) -> tuple[int, int]:
        """Tokens with padding, and visual tokens, of the largest forward pass that the data can give."""
        if not self._fitting:
            return 0, 0
        by_length = sorted(self._fitting, key=lambda index: self._totals[index], reverse=True)
        config = self.config
        if config.pack_length is None:
            share = by_length[: min(config.micro_batch_size, config.batch_size)]
            visual = sorted((self._visual[index] for index in self._fitting), reverse=True)
            return len(share) * self._totals[by_length[0]], sum(visual[: len(share)])
        tokens = _fullest([self._totals[index] for index in by_length], config.pack_length)
        share = max(self._visual[index] / self._totals[index] for index in self._fitting)
        return tokens, round(share * tokens)

    def pixel_choices(self) -> tuple[PixelChoice, ...]:
        """A table of pixel limits against visual tokens; empty without images."""
        sizes = Counter(size for row in self.counted.rows for size in row.images)
        if not sizes:
            return ()
        asked = (self.config.pixels.min_pixels, self.config.pixels.max_pixels)
        limits = {asked} | {
            (low * _TOKEN_PIXELS, high * _TOKEN_PIXELS) for low in _MIN_CHOICES for high in _MAX_CHOICES if low < high
        }
        return tuple(self._choice(low, high, sizes, (low, high) == asked) for low, high in sorted(limits))

    def _choice(self, low: int, high: int, sizes: Counter[tuple[int, int]], is_asked: bool) -> PixelChoice:
        pixels = PixelConfig(min_pixels=low, max_pixels=high)
        try:
            visual = sum(_image_tokens(*size, low, high) * number for size, number in sizes.items())
        except DatasetError as error:
            return PixelChoice(
                min_pixels=low,
                max_pixels=high,
                visual_tokens=None,
                mean_tokens_per_image=None,
                longest_row_tokens=None,
                too_long=None,
                is_asked=is_asked,
                problem=error.message,
            )
        totals = [row.text_tokens + _visual_tokens(row, pixels) for row in self.counted.rows]
        return PixelChoice(
            min_pixels=low,
            max_pixels=high,
            visual_tokens=visual,
            mean_tokens_per_image=visual / sizes.total(),
            longest_row_tokens=max(totals),
            too_long=sum(total > self.limit for total in totals),
            is_asked=is_asked,
        )


def _fullest(lengths: list[int], pack_length: int) -> int:
    """The largest sum of some of the lengths that is within pack_length."""
    possible = 1  # bit n: some lengths have the sum n
    within = (1 << (pack_length + 1)) - 1
    for length in lengths:
        possible |= (possible << length) & within
        if possible >> pack_length:
            return pack_length
    return possible.bit_length() - 1


@lru_cache(maxsize=65536)
def _image_tokens(width: int, height: int, low: int, high: int) -> int:
    return num_visual_tokens(width, height, PixelConfig(min_pixels=low, max_pixels=high))


def _visual_tokens(row: RowSize, pixels: PixelConfig) -> int:
    return sum(_image_tokens(*size, pixels.min_pixels, pixels.max_pixels) for size in row.images)
