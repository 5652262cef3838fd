"""One Settings for every process of the service, from VLM_DFT_* environment variables. Torch-free."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from vlm_dft.config import JudgeConfig


class Settings(BaseSettings):
    """All settings; each field's environment variable is VLM_DFT_ and its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix="VLM_DFT_", frozen=True, extra="ignore", use_attribute_docstrings=True, env_ignore_empty=True
    )

    data_dir: Path = Path(".vlm-dft")
    """Everything the service writes: database, files, runs, models, embedded broker."""
    database_url: str | None = None
    """SQLAlchemy URL; unset: SQLite in the data directory. PostgreSQL: postgresql+psycopg://..."""
    broker_url: str | None = None
    """Celery broker; unset: filesystem transport in the data directory; `vlm-dft up` prefers a redis on PATH."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: SecretStr | None = None
    """Key of the default project; unset on a loopback host: no authentication, unless keys were created."""
    secret: SecretStr | None = None
    """Key of the HMAC over API keys; unset: a random one kept in the data directory."""
    requests_per_minute: int = Field(default=6000, ge=1)
    """Of one API key, unless it has a limit of its own; counted in each API process."""
    organization: str = "org-vlm-dft"
    """organization_id in job objects."""

    models_dir: Path | None = None
    """Each subdirectory with a config.json is a base model by its name; unset: <data>/models/base."""
    hub_models: bool = False
    """Offer the allow-listed hub models too; they are downloaded on first use."""
    dataset_roots: tuple[Path, ...] = ()
    """Directories under which datasets may be registered by server path (JSON list)."""
    benchmarks: Path | None = None
    """Directory with one subdirectory or TSV per benchmark; unset: <data>/benchmarks."""
    judge_base_url: str | None = Field(default=None, pattern=JudgeConfig.model_fields["base_url"].metadata[0].pattern)
    """OpenAI-compatible endpoint of the judge that evaluations may ask for, such as https://api.openai.com/v1.

    Its key is taken from VLM_DFT_JUDGE_API_KEY by the process that asks, and kept nowhere.
    """
    judge_model: str | None = None
    """The judge's model."""
    allow_image_urls: bool = False
    """Fetch https image URLs during validation; private addresses are refused even then."""
    image_url_domains: tuple[str, ...] = ()
    """Hosts that images may be fetched from, with everything below them (JSON list); empty: any public one."""
    isolate_trainers: bool = True
    """Give trainers that need no network none: see vlm_dft.isolation."""

    max_file_bytes: int = Field(default=2 * 2**30, ge=1)
    """One file upload."""
    max_upload_bytes: int = Field(default=64 * 2**30, ge=1)
    """One upload in parts."""
    max_body_bytes: int = Field(default=2**20, ge=1024)
    """One JSON request body."""
    min_free_bytes: int = Field(default=256 * 2**20, ge=0)
    """Uploads are refused when the data disk has less free space."""
    default_max_length_tokens: int = Field(default=4096, ge=8)
    """Length that file validation checks rows against."""

    cache_gib: float = Field(default=100.0, gt=0)
    """Disk budget of each directory of <data>/cache; what no job uses makes room, the longest unused first."""

    scores_gib: float = Field(default=20.0, gt=0)
    """Disk budget of <data>/scores; what was not used for longest makes room after each evaluation."""

    lease_seconds: float = Field(default=60.0, gt=0)
    """A job whose worker did not renew for this long is given to another one; ranks kill themselves at 0.6 of it."""
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    janitor_seconds: float = Field(default=5.0, gt=0)
    republish_seconds: float = Field(default=60.0, gt=0)
    """A queued job's wake-up is published again after this long."""
    max_running_jobs_per_project: int | None = Field(default=None, ge=1)
    """Most jobs of one project on GPU workers at one time; unset: as many as there are workers."""
    max_running_jobs_per_key: int | None = Field(default=None, ge=1)
    """The same for each API key of a project."""
    max_crashes: int = Field(default=3, ge=1)
    """Attempts that may end without a result before the job fails."""
    drain_seconds: float = Field(default=120.0, gt=0)
    """How long a trainer may take to write its checkpoint after SIGTERM."""
    cancel_seconds: float = Field(default=20.0, gt=0)
    """The same after a cancel."""
    poll_seconds: float = Field(default=1.0, gt=0)
    """How often a worker looks at the run directory."""
    webhook_timeout_seconds: float = Field(default=10.0, gt=0)
    """How long a webhook endpoint may take to answer."""
    webhook_private_addresses: bool = False
    """Let webhooks go to private addresses and by plain http too: only where every user may reach those anyway."""

    storage_url: str | None = Field(default=None, pattern=r"^s3://[^/]+(/.*)?$")
    """Object store of files and run directories, such as s3://bucket/prefix; credentials come from AWS's own variables.

    Unset: the data directory, which all hosts then share. Set: the data directory is this host's own cache.
    """
    storage_sync_seconds: float = Field(default=15.0, gt=0)
    """How often a worker copies a running job's logs and metrics to the object store."""

    gc_seconds: float = Field(default=3600.0, gt=0)
    """How often the janitor collects garbage."""
    unreferenced_days: float = Field(default=7.0, ge=0)
    """What no record refers to is removed from disk when it is this old."""
    retention_days: float | None = Field(default=None, ge=0)
    """Run directories of jobs that ended this long ago lose logs, metrics and predictions; unset: kept for ever.

    Models, checkpoints and datasets that the API names stay.
    """
    checkpoint_retention_days: float | None = Field(default=None, ge=0)
    """Checkpoints of jobs that ended this long ago are given up, unless a job that has not ended needs them."""
    file_retention_days: float | None = Field(default=None, ge=0)
    """Files this old are deleted, unless a job that has not ended needs them."""
    cache_retention_days: float | None = Field(default=None, ge=0)
    """Shared scores that were written this long ago are forgotten."""
    audit_retention_days: float = Field(default=400.0, ge=0)
    """Entries of the audit log this old are deleted, and the GPU minutes of months that were over by then."""

    cpu_ranks: int = Field(default=1, ge=1)
    """Processes of one training on a worker without GPUs; with GPUs there is one for each."""
    trainer_python: Path | None = None
    """Python that runs `-m vlm_dft`; unset: the worker's own."""
    vlmeval_python: Path | None = None
    """Python of VLMEvalKit's own virtual environment; with it and the next one, evaluations use VLMEvalKit."""
    vlmeval_root: Path | None = None
    """VLMEvalKit's checkout."""

    @cached_property
    def data(self) -> Path:
        """The data directory, absolute."""
        return self.data_dir.resolve()

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data / 'vlm-dft.db'}"

    @property
    def resolved_models_dir(self) -> Path:
        return (self.models_dir or self.data / "models" / "base").resolve()

    @property
    def resolved_benchmarks(self) -> Path:
        return (self.benchmarks or self.data / "benchmarks").resolve()

    @property
    def files_dir(self) -> Path:
        """Uploaded bytes and parts."""
        return self.data / "files"

    @property
    def runs_dir(self) -> Path:
        """runs/<job>/attempt-<n> run directories."""
        return self.data / "runs"

    @property
    def scores_dir(self) -> Path:
        """Scores that jobs share."""
        return self.data / "scores"

    @property
    def cache_dir(self) -> Path:
        """What jobs share and can make again: images as patches and features, what base models make of targets."""
        return self.data / "cache"

    @property
    def is_loopback(self) -> bool:
        return self.host in {"127.0.0.1", "::1", "localhost"}


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
