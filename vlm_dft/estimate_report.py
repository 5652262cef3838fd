"""What a training would take, as far as it can be told before it runs. Torch-free.

How it is reckoned: ``estimate_rows`` (tokens, steps), ``estimate_memory``. Every part says what it rests on.
"""

from __future__ import annotations

from vlm_dft.frozen import Frozen
from vlm_dft.results import Distribution, RowProblem


class RowsEstimate(Frozen):
    """Which rows would be trained on."""

    total: int
    fit: int
    too_long: int
    """Rows above max_length_tokens, or above pack_length_tokens."""
    too_long_rows: tuple[RowProblem, ...]
    """The first ones."""
    refused: int
    """Rows that this model's chat template cannot take; the job would fail."""
    refused_rows: tuple[str, ...]
    limit_tokens: int
    on_overlong: str
    """error: the job would be refused while too_long is not 0. drop: these rows would be left out."""


class TokensEstimate(Frozen):
    """Exact counts over the rows that fit, one epoch."""

    text: int
    visual: int
    supervised: int | None
    """Null where validation did not count them."""
    total: Distribution
    """Of text and visual together, by row."""
    images: int
    basis: str


class StepsEstimate(Frozen):
    """How often the weights would change."""

    per_epoch: int
    total: int
    samples: int
    """Over the whole training."""
    input_tokens: int
    """The same, text and visual; exact for whole epochs, else the mean row times samples."""


class MemoryEstimate(Frozen):
    """Of one device, at the largest micro-batch that the data can give."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    """What the backward pass needs of the forward pass, and one layer being computed again."""
    vision_gib: float
    """Pixels, the vision tower's own activations, and its features."""
    head_gib: float
    """Logits of one chunk, and the head's gradient before it is added."""
    fixed_gib: float
    """CUDA context and libraries; 0 on a CPU, where they are not the model's."""
    total_gib: float
    parameters: int
    trainable_parameters: int
    precision: str
    largest_micro_batch_tokens: int
    largest_micro_batch_visual_tokens: int
    basis: str


class DeviceFit(Frozen):
    """One kind of device among the workers that are alive."""

    name: str
    count: int
    memory_total_gib: float | None
    """Null: the worker does not tell, as on a CPU."""
    fits: bool | None
    """Null where memory_total_gib is."""


class TimeEstimate(Frozen):
    """From finished jobs, never guessed."""

    seconds: float | None
    """Null: no finished job is comparable."""
    tokens_per_second: float | None
    num_jobs: int
    basis: str


class QueueEstimate(Frozen):
    """How long the job would wait for a worker now."""

    seconds: float | None
    """Null: a job ahead has not said how long it will take."""
    jobs_ahead: int
    workers: int
    """Alive ones of the queue."""
    basis: str


class PixelChoice(Frozen):
    """What other pixel limits would cost."""

    min_pixels: int
    max_pixels: int
    visual_tokens: int | None
    """Over all rows, one epoch; rows that would not fit too. Null: see problem."""
    mean_tokens_per_image: float | None
    longest_row_tokens: int | None
    too_long: int | None
    is_asked: bool
    """Whether these are the request's."""
    problem: str | None = None
    """Why an image of the file cannot be resized under these limits."""
