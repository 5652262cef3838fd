"""What a run does, as one frozen object: RunConfig. Torch-free: the API checks requests with the trainer's own schema.

Unknown keys are refused; the docstring under each field is its documentation, here and in the service's OpenAPI.
This file knows nothing about files inside a run directory (``run_dir``) or about what a run answers (``results``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vlm_dft.frozen import Frozen
from vlm_dft.hyperparameters import Hyperparameters
from vlm_dft.objective_config import ObjectiveConfig
from vlm_dft.pixel_config import PixelConfig
from vlm_dft.preflight_config import PreflightConfig

DatasetFormat = Literal["wethink", "openai", "sharegpt"]
BenchmarkKind = Literal["mathverse", "mathvision", "wemath", "text_math", "custom"]
Scoring = Literal["option", "number", "latex", "exact"]
Backend = Literal["auto", "native", "vlmevalkit"]


class FullConfig(Frozen):
    """Train every parameter that is not frozen."""

    type: Literal["full"] = "full"


class LoraConfig(Frozen):
    """Train low-rank adapters (peft) instead of the weights themselves."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=1024)
    """Rank."""
    alpha: int = Field(default=16, ge=1, le=4096)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    targets: Literal["language", "all"] = "language"
    """language: the linear layers of the language model. all: those of the vision tower too."""
    quantization: Literal["nf4"] | None = None
    """nf4: keep the frozen language model in 4 bits while training (QLoRA, bitsandbytes); needs a CUDA device."""


class FreezeConfig(Frozen):
    """Which parts keep their weights; for text models only language_model means something."""

    vision_tower: bool = True
    """Freeze the vision tower."""
    merger: bool = True
    """Freeze the merger (the projector from vision to language)."""
    language_model: bool = False
    """Freeze the language model, its embeddings and head."""


class CacheConfig(Frozen):
    """Files made once, for all epochs and all runs that name the same directory."""

    directory: Path
    max_gib: float = Field(default=100.0, gt=0.0)
    """Largest size of the directory. What other runs have left makes room, the longest unused first, once none of them
    is going on; a run that still needs more is refused before it starts."""


class BenchmarkConfig(Frozen):
    """One benchmark to score."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]*$")
    """How the score is called, such as mathverse or mathverse:vision-only."""
    kind: BenchmarkKind
    path: Path
    """A VLMEvalKit TSV, an official JSON or JSONL, or a directory that holds one (images beside it)."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first items; the score is then marked as a subset."""
    scoring: Scoring | None = None
    """How rows of a custom benchmark are graded that do not say so; None: by option where there are, else as LaTeX."""

    @model_validator(mode="after")
    def _scoring_belongs_to_custom(self) -> Self:
        if self.scoring is not None and self.kind != "custom":
            raise ValueError(f"scoring belongs to custom benchmarks: {self.kind} has its own")
        return self


class GenerationSettings(Frozen):
    """How answers are asked for and generated, apart so that the API offers the same settings with the same limits."""

    backend: Backend = "auto"
    """Who asks and scores. auto: VLMEvalKit where it is installed and can score a benchmark, native otherwise."""
    prompt: Literal["direct", "cot"] = "direct"
    """Which of the benchmark's published prompts is used."""
    system_prompt: str | None = None
    """None: the chat template's own."""
    max_new_tokens: int = Field(default=2048, ge=1, le=65536)
    """Where an answer is cut."""
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    """0: greedy."""
    samples_per_item: int = Field(default=1, ge=1, le=256)
    """k: each item is answered k times, each time from a seed of its own, and the score is average@k."""
    batch_size: int = Field(default=8, ge=1, le=1024)
    """Answers generated at once: changes speed and memory."""
    seed: int = Field(default=42, ge=0, le=2**31 - 1)
    """Of sampled answers, where temperature is above 0."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples_per_item > 1 and self.temperature == 0:
            raise ValueError(f"samples_per_item {self.samples_per_item}: at temperature 0 all samples are the same")
        return self


class VlmevalkitConfig(Frozen):
    """How long VLMEvalKit's process may take before it is ended; what it did so far is kept."""

    stall_timeout_seconds: float = Field(default=1800.0, gt=0.0)
    """Without writing anything: longer than loading the model, and than one batch of answers."""
    total_timeout_seconds: float = Field(default=7 * 86400.0, gt=0.0)
    """For all benchmarks of one model together."""


class AccuracyProbeConfig(Frozen):
    """A few fixed benchmark items, answered during a training (``vlm_dft.accuracy_probe``)."""

    benchmark: BenchmarkConfig
    """Its limit says how many items; graded by rules, without a judge."""
    every_steps: int = Field(default=100, ge=1)
    """Beside before the first step and after the last one."""
    patience: int | None = Field(default=None, ge=1)
    """End the training when that many measurements in a row bring no new best value, and export the best ones' weights
    (the first of equals, not those before the first step) whenever it ends; None: measure only, export the last."""
    generation: GenerationSettings = GenerationSettings(max_new_tokens=512)

    @model_validator(mode="after")
    def _one_sample(self) -> Self:
        if self.generation.samples_per_item != 1:
            raise ValueError("a probe takes one sample per item")
        return self


class TrainConfig(Hyperparameters):
    """One fine-tuning run. The defaults are the DFT paper's where it states them."""

    model: str
    """Directory of the base model, or a hub id on the allow-list."""
    revision: str | None = None
    """Commit of a hub model; required when model is a hub id."""
    dataset: Path
    """Canonical dataset directory, as validation wrote it (``vlm_dft.data.canonical``)."""
    validation_dataset: Path | None = None
    """Held-out canonical dataset; its NLL is measured before the first step, at each checkpoint and at the end."""
    objective: ObjectiveConfig = ObjectiveConfig()
    adapter: Annotated[FullConfig | LoraConfig, Field(discriminator="type")] = FullConfig()
    freeze: FreezeConfig = FreezeConfig()
    pixels: PixelConfig = PixelConfig()
    seed: int = Field(default=42, ge=0, le=2**31 - 1)
    """Order of the samples, dropout and adapter initialisation."""
    patch_cache: CacheConfig | None = None
    """Keep decoded and resized images, 0.6 MB for one of 448 x 448 pixels; changes speed, never a number."""
    vision_cache: CacheConfig | None = None
    """Keep a frozen vision tower's features, so that neither images nor tower are needed after the first pass."""
    reference_cache: CacheConfig | None = None
    """Keep what the base model makes of a dataset's targets, 4 bytes for each, where the objective asks for it."""
    compile: bool = False
    """torch.compile the language model's layers: a minute or more at the start, faster steps on a GPU."""
    fsdp: bool = False
    """Cut the language model's layers over all processes (FSDP2), where one device cannot hold them with their moments.
    Needs torchrun; a checkpoint fits any number of processes."""
    accuracy_probe: AccuracyProbeConfig | None = None
    """Answers to benchmark items during the training, which may end it."""
    resume_from: Path | None = None
    """Complete checkpoint directory of an earlier attempt of the same run."""

    @model_validator(mode="after")
    def _fsdp_has_layers_to_cut(self) -> Self:
        if self.fsdp and isinstance(self.adapter, FullConfig) and self.freeze.language_model:
            raise ValueError("fsdp cuts the language model's layers, and they are frozen: leave it out")
        if self.fsdp and isinstance(self.adapter, LoraConfig) and self.adapter.quantization is not None:
            raise ValueError("fsdp cannot cut 4-bit weights: leave fsdp or adapter.quantization out")
        if self.fsdp and self.accuracy_probe is not None:
            raise ValueError("the accuracy probe needs the whole model in each process: leave it or fsdp out")
        if self.fsdp and self.sample_rows:
            raise ValueError(f"sample_rows {self.sample_rows} need the whole model in each process: set 0, or no fsdp")
        return self

    @model_validator(mode="after")
    def _cached_features_stay_true(self) -> Self:
        if self.vision_cache is None:
            return self
        if isinstance(self.adapter, FullConfig) and not (self.freeze.vision_tower and self.freeze.merger):
            raise ValueError("vision_cache needs a frozen vision tower and merger: set freeze, or leave it out")
        if isinstance(self.adapter, LoraConfig) and self.adapter.targets != "language":
            raise ValueError("vision_cache needs an unchanged vision tower: set adapter.targets to language")
        if self.patch_cache is not None:
            raise ValueError("patch_cache has no use beside vision_cache, which needs each image once: leave one out")
        return self


class JudgeConfig(Frozen):
    """A language model that decides what rules cannot, at any OpenAI-compatible endpoint.

    Its key comes from the environment variable VLM_DFT_JUDGE_API_KEY alone and is written nowhere.
    """

    base_url: str = Field(pattern=r"^https?://[^@\s/?#]+(/[^@\s?#]*)?$")
    """Such as https://api.openai.com/v1, without credentials."""
    model: str = Field(min_length=1, max_length=200)
    timeout_seconds: float = Field(default=120.0, gt=0.0, le=3600.0)
    """Of one request."""
    max_attempts: int = Field(default=5, ge=1, le=20)
    """Per question to the judge; then the evaluation fails, and its predictions are kept."""
    max_requests: int = Field(default=20_000, ge=1)
    """Budget of one evaluation, retries by us included; beyond it the evaluation fails, and goes on when run again."""
    parallel: int = Field(default=8, ge=1, le=256)
    """Requests at once."""


class EvalConfig(GenerationSettings):
    """Generate answers to benchmark items and score them by rule."""

    model: str | None = None
    """Model directory or hub id; None: the model that this run has just trained."""
    revision: str | None = None
    benchmarks: tuple[BenchmarkConfig, ...] = Field(min_length=1)
    include_base: bool = False
    """Score the base model of the training as well, on the same items with the same settings."""
    judge: JudgeConfig | None = None
    """None: rules alone."""
    score_cache: Path | None = None
    """Directory that runs share: a model answers a benchmark once under the same settings."""
    score_cache_gib: float = Field(default=20.0, gt=0.0)
    """Its largest size after an evaluation: what was not used for longest makes room."""
    training_dataset: Path | None = None
    """Canonical dataset that the model was trained on: overlaps with the benchmarks are reported."""
    pixels: PixelConfig = PixelConfig()
    vlmevalkit: VlmevalkitConfig = VlmevalkitConfig()
    resume_from: Path | None = None
    """Run directory of an earlier attempt: its predictions are kept where model, items and settings are the same."""


class ValidationLimits(Frozen):
    """What one training file may hold; larger things are reported as invalid, never shortened."""

    max_row_bytes: int = Field(default=64 * 2**20, ge=1)
    """Longest line, data: URIs included."""
    max_images_per_row: int = Field(default=64, ge=0)
    max_image_bytes: int = Field(default=20 * 2**20, ge=1)
    """Encoded size of one image."""
    max_image_pixels: int = Field(default=40_000_000, ge=1)
    """Decoded size of one image; guards against decompression bombs."""
    max_aspect_ratio: float = Field(default=200.0, ge=1.0)
    """qwen-vl-utils refuses more."""
    max_archive_entries: int = Field(default=2_000_000, ge=1)
    max_archive_bytes: int = Field(default=512 * 2**30, ge=1)
    """Unpacked size of an archive."""
    max_archive_ratio: float = Field(default=100.0, ge=1.0)
    """Unpacked size over packed size of one entry."""
    max_reported_rows: int = Field(default=100, ge=1)
    """Invalid rows listed in the report; all are counted."""


class ValidationConfig(Frozen):
    """Check one training file and write it as a canonical dataset."""

    source: Path
    """The uploaded file, or a dataset directory under an allowed root."""
    filename: str
    """Its name as the user knows it; reports quote it."""
    data_file: str | None = None
    """The file in the archive or directory that holds the rows; None: its only .jsonl or .json, else data.jsonl."""
    format: DatasetFormat | Literal["auto"] = "auto"
    tokenizer: str | None = None
    """Model directory whose tokenizer and chat template count tokens; None: no token statistics."""
    max_length_tokens: int = Field(default=4096, ge=8)
    """Rows above it are listed as what would not fit."""
    pixels: PixelConfig = PixelConfig()
    system_prompt: str | None = None
    """System turn for rows that bring none; None: WeThink rows get ours, other rows none."""
    max_invalid_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of invalid rows above which the whole file is refused; at or below it they are left out and counted."""
    allow_image_urls: bool = False
    """Fetch https images at validation time; private addresses are refused even then."""
    image_url_domains: tuple[str, ...] = ()
    """Hosts that images may be fetched from, with everything below them; empty: any public one."""
    limits: ValidationLimits = ValidationLimits()


class SupervisionConfig(Frozen):
    """How a rank notices that its supervisor is gone (see ``vlm_dft.watchdog``)."""

    lease_timeout_seconds: float = Field(gt=0)
    """The rank kills itself when the run directory's lease file has not changed for this long."""
    attempt: int | None = None
    """Which attempt at the job this is; in every line of the log."""
    request_id: str | None = None
    """The request that submitted the job; in every line of the log."""


class RunConfig(Frozen):
    """config.json of a run directory: a validation, or a preflight, or a training, an evaluation, or both."""

    run_id: str
    """Name in logs and reports; the service puts the job's id here."""
    validation: ValidationConfig | None = None
    preflight: PreflightConfig | None = None
    train: TrainConfig | None = None
    evaluation: EvalConfig | None = None
    supervision: SupervisionConfig | None = None

    @model_validator(mode="after")
    def _does_something_sensible(self) -> Self:
        alone = [name for name in ("validation", "preflight") if getattr(self, name) is not None]
        if alone and (len(alone) > 1 or self.train is not None or self.evaluation is not None):
            raise ValueError(f"a {alone[0]} runs alone: leave out the other parts")
        if not alone and self.train is None and self.evaluation is None:
            raise ValueError("nothing to do: give validation, preflight, train or evaluation")
        if alone:
            return self
        if self.train is None and self.evaluation is not None and self.evaluation.model is None:
            raise ValueError("evaluation.model is needed when the run does not train")
        if self.train is None and self.evaluation is not None and self.evaluation.include_base:
            raise ValueError("evaluation.include_base needs a training in the same run")
        return self
