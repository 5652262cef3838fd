"""``python -m vlm_dft.preview``: a PreviewConfig on stdin, a PreviewReport on stdout. Tokenizes, never opens a weight.

The API may not import transformers, so it asks this process. Exit code 1: stdout is an ErrorRecord.
Torch-free: what is rendered here is rendered as training does, by the same ``data.template``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator

from vlm_dft.data.canonical import CanonicalDataset, ImagePart, Row
from vlm_dft.data.pixels import num_visual_tokens, patch_grid, resized_size
from vlm_dft.data.problems import RowError
from vlm_dft.data.template import ChatTemplate, Rendered
from vlm_dft.errors import DatasetError
from vlm_dft.pixel_config import PixelConfig
from vlm_dft.preview_report import PreviewConfig, PreviewImage, PreviewReport, PreviewRow, TrainedSpan
from vlm_dft.tokenizing import answer_on_stdout, open_template


def preview(config: PreviewConfig) -> PreviewReport:
    """The rows that config names. Raises DatasetError, ModelError."""
    dataset = CanonicalDataset.open(config.dataset)
    if config.first_row > len(dataset):
        raise DatasetError(f"first_row {config.first_row}: the file has {len(dataset)} rows", param="first_row")
    template = open_template(config.model, config.revision)
    rows = itertools.islice(dataset, config.first_row - 1, config.first_row - 1 + config.num_rows)
    return PreviewReport(
        rows_total=len(dataset),
        max_length_tokens=config.max_length_tokens,
        rows=tuple(preview_row(row, template, config.pixels, config.max_length_tokens) for row in rows),
    )


def preview_row(row: Row, template: ChatTemplate, pixels: PixelConfig, max_length_tokens: int) -> PreviewRow:
    """One row; what the template or a picture refuses is told in its ``problem``. Raises ModelError."""
    try:
        rendered = template.render(row)
        sizes = [num_visual_tokens(part.width, part.height, pixels) for part in row.images]
        places = _places(rendered, sizes)
        images = tuple(_images(row.images, rendered, sizes, places, pixels))
    except (RowError, DatasetError) as error:
        return PreviewRow(
            row=row.id,
            text="",
            trained_spans=(),
            images=(),
            text_tokens=0,
            visual_tokens=0,
            total_tokens=0,
            supervised_tokens=0,
            fits=False,
            problem=error.reason if isinstance(error, RowError) else error.message,
        )
    total = rendered.text_tokens + sum(sizes)
    return PreviewRow(
        row=row.id,
        text=rendered.text,
        trained_spans=tuple(_spans(rendered, places)),
        images=images,
        text_tokens=rendered.text_tokens,
        visual_tokens=sum(sizes),
        total_tokens=total,
        supervised_tokens=rendered.supervised_tokens,
        fits=total <= max_length_tokens,
    )


def _places(rendered: Rendered, sizes: list[int]) -> list[int]:
    """Where each rendered token begins in the trained sequence, and at last the sequence's length."""
    lengths = [1] * len(rendered.input_ids)
    for position, size in zip(rendered.image_positions, sizes, strict=True):
        lengths[position] = size
    return [0, *itertools.accumulate(lengths)]


def _spans(rendered: Rendered, places: list[int]) -> Iterator[TrainedSpan]:
    """Stretches of supervised tokens; turns are apart, because the template stands between them."""
    numbered = enumerate(rendered.supervised)
    for supervised, group in itertools.groupby(numbered, key=lambda entry: entry[1]):
        if supervised:
            indices = [index for index, _ in group]
            yield TrainedSpan(
                start=rendered.spans[indices[0]][0],
                end=rendered.spans[indices[-1]][1],
                token_start=places[indices[0]],
                token_end=places[indices[-1] + 1],
            )


def _images(
    parts: Iterable[ImagePart], rendered: Rendered, sizes: list[int], places: list[int], pixels: PixelConfig
) -> Iterator[PreviewImage]:
    for part, position, size in zip(parts, rendered.image_positions, sizes, strict=True):
        width, height = resized_size(part.width, part.height, pixels)
        yield PreviewImage(
            image=part.image,
            width=part.width,
            height=part.height,
            resized_width=width,
            resized_height=height,
            grid_thw=patch_grid(part.width, part.height, pixels),
            visual_tokens=size,
            start=rendered.spans[position][0],
            end=rendered.spans[position][1],
            token_start=places[position],
            token_end=places[position + 1],
        )


if __name__ == "__main__":
    sys.exit(answer_on_stdout(PreviewConfig, preview))
