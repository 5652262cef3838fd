"""Every error a user can meet, as a tree. Torch-free.

    VlmDftError
    ├── ConfigError                 invalid_config            a setting that cannot be used
    ├── DatasetError                invalid_training_file     rows, images or archives that cannot be used
    │   └── SampleTooLongError      sample_too_long           a sample over the length limit
    ├── ModelError                  unsupported_model         a model that cannot be loaded
    ├── CheckpointError             invalid_checkpoint        a checkpoint of another configuration, or torn
    ├── NanLossError                nan_loss                  the loss is not finite
    ├── OutOfMemoryError            gpu_oom                   the device is full
    ├── DiskFullError               disk_full                 the disk is full
    ├── ExportError                 export_failed             the exported model is not the trained one
    ├── BenchmarkError              benchmark_unavailable     a benchmark's files are absent or not understood
    └── EvaluationError             evaluation_failed         an evaluation that could not be scored

Rules: raise the most specific class; the message names the value, the place and the remedy; the docstring is the
default message. ``code`` travels to the API as ``error.code``; ``param`` is a dotted path into the request or config.
"""

from __future__ import annotations

from typing import ClassVar, Literal


class VlmDftError(Exception):
    """Something failed that has no better name: please report it with the run's log."""

    code: ClassVar[str] = "internal_error"
    category: ClassVar[Literal["user", "server"]] = "server"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, param: str | None = None, hint: str | None = None) -> None:
        self.message = message or (self.__doc__ or type(self).__name__).strip()
        self.param = param
        self.hint = hint
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments do not survive the default pickling of exceptions.
        return (_rebuild, (type(self), self.message, self.param, self.hint))


def _rebuild(cls: type[VlmDftError], message: str, param: str | None, hint: str | None) -> VlmDftError:
    return cls(message, param=param, hint=hint)


class ConfigError(VlmDftError, ValueError):
    """A setting cannot be used: see the message for the field and the values it takes."""

    code = "invalid_config"
    category = "user"


class DatasetError(VlmDftError, ValueError):
    """The training file cannot be used: see its validation report for the rows and reasons."""

    code = "invalid_training_file"
    category = "user"


class SampleTooLongError(DatasetError):
    """A sample is longer than the limit: raise max_length_tokens, lower max_pixels, or set on_overlong to "drop"."""

    code = "sample_too_long"


class ModelError(VlmDftError, ValueError):
    """The model cannot be loaded: Qwen2.5-VL, Qwen2, Qwen2.5 and Llama directories with safetensors are supported."""

    code = "unsupported_model"
    category = "user"


class CheckpointError(VlmDftError, ValueError):
    """The checkpoint cannot be resumed from: it is incomplete, or was written by another configuration."""

    code = "invalid_checkpoint"
    category = "user"


class NanLossError(VlmDftError, ArithmeticError):
    """The loss is not finite: lower the learning rate, or look at the samples that the message names."""

    code = "nan_loss"
    category = "user"


class OutOfMemoryError(VlmDftError, MemoryError):
    """The device ran out of memory: lower micro_batch_size, max_length_tokens or max_pixels, or use LoRA."""

    code = "gpu_oom"
    category = "user"


class DiskFullError(VlmDftError, OSError):
    """The disk is full: free space or move the data directory; nothing half-written was kept."""

    code = "disk_full"


class ExportError(VlmDftError):
    """The exported model was reloaded and does not compute what the trained one does."""

    code = "export_failed"


class BenchmarkError(VlmDftError, ValueError):
    """The benchmark's files are absent or not understood: see the message for which file goes where."""

    code = "benchmark_unavailable"
    category = "user"


class EvaluationError(VlmDftError):
    """The evaluation could not be scored; its predictions were kept."""

    code = "evaluation_failed"
