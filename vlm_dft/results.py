"""What a run answers: result.json, the lines of metrics.jsonl, progress.json. Torch-free; read by worker and API.

Knows nothing about how the numbers were made. Numerators and denominators are both kept, so that a reader can check.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from vlm_dft.data.canonical import Message
from vlm_dft.preflight_report import PreflightReport

Phase = Literal["starting", "validating", "loading_model", "running", "checkpointing", "exporting", "evaluating"]


class Record(BaseModel):
    """Base of what a run writes: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ErrorRecord(Record):
    """An error as the API shows it."""

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    category: Literal["user", "server"] = "server"
    retryable: bool = False


class Progress(Record):
    """progress.json: where the run is now; replaced atomically."""

    phase: Phase
    step: int = 0
    total_steps: int | None = None
    tokens_per_second: float | None = None
    """Input tokens, text and visual, without padding."""
    seconds_remaining: float | None = None
    benchmark: str | None = None
    items_done: int | None = None
    """Rows validated, or benchmark items answered."""
    items_total: int | None = None


class StepMetrics(Record):
    """One line of metrics.jsonl per logged optimizer step."""

    step: int
    epoch: float
    objective_loss: float
    """Sum of weight x NLL over the batch's supervised tokens, divided by their number."""
    nll: float
    """Mean raw negative log-likelihood of the same tokens, whatever the objective."""
    mean_weight: float
    effective_sample_size: float
    """(sum w)^2 / (n sum w^2), in 0..1: the share of tokens that count."""
    share_p_below_01: float
    share_p_above_09: float
    eos_nll: float | None
    """Mean NLL of end-of-turn tokens; rising means the model forgets to stop."""
    entropy: float | None
    """Mean entropy of the predicted distribution in nats."""
    token_accuracy: float
    """Share of supervised tokens that are the arg-max."""
    kl: float | None = None
    """Mean KL(base model || model), where the objective is anchored to the base model."""
    num_tokens: int
    """Supervised tokens in the batch: the denominator of all of the above."""
    input_tokens: int
    """All tokens in the batch, prompts and images included, padding excluded."""
    num_samples: int
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    samples_per_second: float
    peak_memory_gib: float
    data_wait_share: float | None = None
    """Share of the step's time in which the device waited for its data."""
    time: float
    """Seconds since the epoch."""


class ValidationMetrics(Record):
    """Held-out loss at one step; also a line of metrics.jsonl."""

    step: int
    valid_nll: float
    valid_objective_loss: float
    valid_token_accuracy: float
    valid_num_tokens: int
    time: float


class Histogram(Record):
    """One line of histograms.jsonl: how probable the targets of a fixed set of rows are at one step."""

    step: int
    split: Literal["train", "validation"]
    part: Literal["reasoning", "answer"]
    """reasoning: from <think> to </think>. answer: every other supervised token."""
    counts: tuple[int, ...]
    """Tokens whose probability lies in the first, second, ... of equal shares of 0..1."""
    num_tokens: int
    num_rows: int
    time: float


class AccuracyPoint(Record):
    """One line of accuracy.jsonl: how many of a few fixed benchmark items the model answers right at one step."""

    step: int
    probe_benchmark: str
    probe_metric: str
    probe_value: float
    """0..1."""
    probe_numerator: float
    probe_denominator: float
    """value = numerator / denominator."""
    probe_standard_error: float
    probe_items: int
    probe_seconds: float
    time: float


class SampleAnswer(Record):
    """One line of samples.jsonl: what the model answers to a row of its data at one step, greedily."""

    step: int
    split: Literal["train", "validation"]
    row_id: str
    """file:line of the source."""
    prompt: tuple[Message, ...]
    """The turns before the last one that is trained."""
    reference: str
    """That turn."""
    answer: str
    num_tokens: int
    """Of the answer, its end token included."""
    finish_reason: Literal["stop", "length", "error"]
    """length: cut at sample_max_new_tokens, or at the model's context. error: the prompt leaves no room there."""
    error: str | None = None
    time: float


class TrainResult(Record):
    """What a finished training leaves behind."""

    steps: int
    trained_tokens: int
    """Supervised tokens over all steps, counted once however often the run was interrupted."""
    input_tokens: int
    num_samples: int
    dropped_samples: int
    """Samples over the length limit that on_overlong="drop" left out."""
    first_nll: float
    last_nll: float
    valid_nll_before: float | None = None
    valid_nll_after: float | None = None
    """Of the weights that were exported."""
    wall_seconds: float
    """Of this attempt, loading excluded."""
    resumed_from_step: int | None = None
    stopped_early: bool = False
    """Whether the accuracy probe ended the training before its last step."""
    exported_step: int | None = None
    """Whose weights were exported: the last step's, or, with patience, those that the probe found best; None: of an
    older version, the last step's."""
    export: str
    """Directory of the exported model, relative to the run directory."""
    adapter: str | None = None
    """Directory of the adapter, for LoRA."""
    model_sha256: str
    """Hash of the exported weights."""
    data_fingerprint: str
    device: str
    precision: str
    image_backend: str
    versions: dict[str, str]


class Score(Record):
    """One benchmark's result for one model. Two scores compare only if scorer, judge, prompt, set, generation agree."""

    benchmark: str
    kind: str
    model: str
    """The model directory or id that answered."""
    model_role: Literal["base", "tuned"]
    model_sha256: str
    metric: str
    """What value is: acc, mean_over_versions, score_strict."""
    value: float
    """0..1."""
    numerator: float
    denominator: float
    """value = numerator / denominator."""
    standard_error: float
    n: int
    """Items scored."""
    n_total: int
    """Items in the whole benchmark file."""
    whole: bool
    """Whether n covers the published benchmark; false for a subset."""
    items_sha256: str = ""
    """Hash over the items scored: questions, pictures and answers. Different for different sets of the same size."""
    by_category: dict[str, dict[str, float]]
    """Category, then {value, n} or the benchmark's own rates."""
    scorer: str
    """Such as native-rules/v1."""
    judge: str
    """none for rule-based scoring."""
    judged: int = 0
    """Answers that a judge looked at; rules decided the others."""
    prompt: str
    generation: dict[str, Any]
    pixels: dict[str, int]
    image_backend: str
    failure_rate: float
    """Share of items without a usable generation; they count as wrong."""
    extraction_rate: float
    """Share of items in which an answer was found, by rule or by the judge."""
    predictions: str
    """File with every prediction, relative to the run directory."""
    wall_seconds: float
    """Of the generation and scoring, wherever they ran."""
    contaminated: int | None = None
    """Items that stand whole in one row of the training data (contamination.json); None: not checked."""
    contaminated_questions: int | None = None
    """Items whose question stands there, with their picture or without; templates make many alike."""
    contaminated_pictures: int | None = None
    """Items whose picture stands there, whatever is asked about it."""
    clean_value: float | None = None
    """The value without what stands there whole, problems and groups together; None: not checked, or none is left."""
    clean_value_strict: float | None = None
    """The value without what stands there in any way."""
    from_cache: bool = False
    """Whether the answers are an earlier run's, of the same model under the same settings."""


class RowProblem(Record):
    """One invalid row, or one thing that would not fit."""

    file: str
    line: int
    """1-based; for a JSON array, the element's number; 0: the whole file."""
    field: str
    """Dotted path inside the row."""
    reason: str
    """What is wrong with which value, and what to do."""
    code: str
    """Machine-readable reason, such as image_truncated or placeholder_mismatch."""


class Distribution(Record):
    """Summary of one count over rows."""

    total: int
    min: int
    p50: int
    p95: int
    max: int

    @classmethod
    def of(cls, values: Iterable[int]) -> Self:
        """Of at least one count."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(
            total=sum(ordered),
            min=ordered[0],
            p50=ordered[last * 50 // 100],
            p95=ordered[last * 95 // 100],
            max=ordered[last],
        )


class TokenStatistics(Record):
    """Token counts over valid rows, as the named tokenizer and pixel limits give them."""

    tokenizer: str
    tokenizer_sha256: str
    min_pixels: int
    max_pixels: int
    text: Distribution
    visual: Distribution
    supervised: Distribution
    total: Distribution


class ValidationReport(Record):
    """What validation found in one training file."""

    filename: str
    format: str
    rows: int
    valid: int
    invalid: int
    images: int
    """Pictures in valid rows."""
    duplicates: int
    """Valid rows equal to an earlier one; kept, and counted here."""
    problems: tuple[RowProblem, ...]
    """The first invalid rows."""
    overlong: int
    """Valid rows above max_length_tokens; kept in the dataset, refused by a job that keeps that limit."""
    overlong_rows: tuple[RowProblem, ...]
    max_length_tokens: int
    tokens: TokenStatistics | None
    fingerprint: str
    """sha256 over the canonical rows in order, images by hash."""
    dataset: str | None
    """Canonical dataset directory relative to the run directory; None when the file was refused."""


class RunResult(Record):
    """result.json: written once, last. Its absence means that the process crashed."""

    status: Literal["succeeded", "failed", "interrupted"]
    """interrupted: asked to stop, checkpoint written, resume later."""
    error: ErrorRecord | None = None
    train: TrainResult | None = None
    scores: tuple[Score, ...] = ()
    evaluation_error: ErrorRecord | None = None
    """The evaluation's failure, which does not fail the training."""
    validation: ValidationReport | None = None
    preflight: PreflightReport | None = None
