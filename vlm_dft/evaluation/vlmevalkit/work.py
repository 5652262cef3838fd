"""VLMEvalKit's working directory for one model: inference first, then scoring, each started until it went well.

    evaluation/<role>/vlmevalkit-<identity>/
    ├── asking.json, config.json, judge.json    for our model class, for run.py, for the judge's requests
    ├── answers/                   one log per data set, facts.json, failure.json
    ├── data/                      TSVs and pictures as VLMEvalKit reads them
    ├── outputs/<role>/T<time>/    what VLMEvalKit wrote, one directory per start
    └── log.txt                    what it said

The identity is a hash over everything that decides an answer or a score, so a directory is only ever continued, never
mixed. A start that dies or stalls is tried again with --reuse; what ended by itself with an error is not, because the
next start would end in the same way. Knows nothing about how results are read (``outcome``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vlm_dft import errors
from vlm_dft.config import BenchmarkConfig, EvalConfig, GenerationSettings, JudgeConfig
from vlm_dft.data.tokens import tokenizer_sha256
from vlm_dft.errors import EvaluationError, VlmDftError
from vlm_dft.evaluation.answering import Role, earlier_attempts
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.items import Benchmark
from vlm_dft.evaluation.vlmevalkit import outcome
from vlm_dft.evaluation.vlmevalkit.answer_log import Answer, AnswerLog, carry_over
from vlm_dft.evaluation.vlmevalkit.installation import Installation
from vlm_dft.evaluation.vlmevalkit.judge_requests import JudgeRules
from vlm_dft.evaluation.vlmevalkit.meter import Meter
from vlm_dft.evaluation.vlmevalkit.model import FACTS_NAME, FAILURE_NAME, Asking
from vlm_dft.evaluation.vlmevalkit.process import LOG_NAME, Deadline, End, environment, run_once
from vlm_dft.evaluation.vlmevalkit.runner import JUDGE_VARIABLE, KEY_VARIABLE, MODEL_CLASS
from vlm_dft.evaluation.vlmevalkit.tables import Table, table_name, table_of, write_table
from vlm_dft.model_files import ADAPTER_CONFIG, adapter_base, config_sha256, locate
from vlm_dft.run_dir import RunDir, disk_errors, write_json

MAX_STARTS: Final = 3
"""Of inference and of scoring, each."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """One benchmark as configured, read, and as VLMEvalKit's table."""

    config: BenchmarkConfig
    whole: Benchmark
    chosen: Benchmark
    table: Table


@dataclass(frozen=True)
class Model:
    """Who answers. source: what the score says; path: its directory."""

    role: Role
    source: str
    path: Path
    sha256: str


def read_benchmark(config: EvalConfig, position: int, entry: BenchmarkConfig) -> Asked:
    """position: of the benchmark in the evaluation. Raises BenchmarkError. Loads no model and starts nothing."""
    whole = load_benchmark(entry, config.prompt)
    table = table_of(table_name(position, entry.kind, config.prompt), whole, whole.first(entry.limit))
    return Asked(entry, whole, whole.first(entry.limit), table)


class Work:
    """The working directory of one model's evaluation."""

    def __init__(
        self,
        config: EvalConfig,
        run: RunDir,
        installation: Installation,
        asked: Sequence[Asked],
        model: Model,
    ) -> None:
        self.config, self.run, self.installation, self.asked = config, run, installation, asked
        self.judge, self.model = config.judge, model
        name = f"vlmevalkit-{_sha256([self.identity(entry) for entry in asked])[:12]}"
        self.path = run.evaluation_path(model.role, name)
        self.answers, self.data, self.outputs = self.path / "answers", self.path / "data", self.path / "outputs"
        self._earlier_runs: list[Path] = []
        self._end = time.monotonic() + config.vlmevalkit.total_timeout_seconds

    def identity(self, entry: Asked) -> dict[str, Any]:
        """What must be equal for an answer or a score of an earlier start to be as good as a new one."""
        settings = GenerationSettings.model_fields.keys() - {"batch_size", "backend"}
        return {
            "model_sha256": self.model.sha256,
            "config_sha256": config_sha256(self.model.path),
            "tokenizer_sha256": tokenizer_sha256(_tokenizer_directory(self.model.path)),
            "benchmark_sha256": entry.whole.sha256,
            "generation": self.config.model_dump(include=set(settings)),
            "pixels": self.config.pixels.model_dump(),
            "scorer": self.installation.scorer,
            "versions": dict(self.installation.versions),
            "judge": self.judge_name,
        }

    @property
    def judge_name(self) -> str:
        return self.judge.model if self.judge else outcome.EXACT_MATCHING

    @property
    def judge_file_name(self) -> str:
        """What VLMEvalKit calls the judge in file names: a model's own name may hold a slash."""
        return "judge" if self.judge else outcome.EXACT_MATCHING

    def answers_path(self, entry: Asked) -> Path:
        return self.answers / f"{entry.table.name}.jsonl"

    def prepare(self) -> None:
        """Everything that VLMEvalKit reads. Answers of earlier attempts of the same identity are taken over."""
        with disk_errors(self.path):
            for directory in (self.answers, self.data, self.outputs):
                directory.mkdir(parents=True, exist_ok=True)
        attempts = earlier_attempts(self.config)
        earlier = [run.evaluation_path(self.model.role, self.path.name) for run in attempts]
        for entry in self.asked:
            write_table(entry.table, self.data)
            self._carry_over(self.answers_path(entry).name, earlier)
        self._carry_over(FACTS_NAME, earlier)
        asking = Asking(
            model=str(self.model.path.absolute()),
            revision=None,
            settings=GenerationSettings(**self.config.model_dump(include=set(GenerationSettings.model_fields))),
            pixels=self.config.pixels,
            answers=self.answers,
        )
        write_json(self.path / "asking.json", asking)
        data = {
            entry.table.name: {"class": entry.table.class_name, "dataset": entry.table.name} for entry in self.asked
        }
        model = {self.model.role: {"class": MODEL_CLASS, "asking": str(self.path / "asking.json")}}
        write_json(self.path / "config.json", {"model": model, "data": data})

    def _carry_over(self, name: str, earlier: Sequence[Path]) -> None:
        carry_over(self.answers / name, [path / "answers" / name for path in earlier])

    def answers_of(self, entry: Asked) -> dict[int, Answer]:
        """By index, those of other items than the chosen ones included."""
        return AnswerLog.open(self.answers_path(entry)).done

    def infer(self) -> None:
        """Every item answered."""
        self._start_until(self._check_inference, ["--mode", "infer", "--reuse"], {})

    def score(self) -> None:
        """Every answer scored, without a device: the model is not loaded again."""
        arguments = ["--mode", "eval", "--judge", self.judge_file_name]
        extra = {"CUDA_VISIBLE_DEVICES": ""}
        if self.judge:
            arguments += ["--judge-base-url", self.judge.base_url, "--judge-retry", str(self.judge.max_attempts)]
            arguments += ["--judge-timeout", str(math.ceil(self.judge.timeout_seconds))]
            arguments += ["--judge-api-nproc", str(self.judge.parallel)]
            extra |= self._judge_environment(self.judge)
        self._start_until(self._check_scoring, arguments, extra)

    def _judge_environment(self, judge: JudgeConfig) -> dict[str, str]:
        rules = JudgeRules(
            max_requests=judge.max_requests,
            cache=(self.config.score_cache or self.run.path / "evaluation") / "judge-vlmevalkit",
            failure=self.answers / FAILURE_NAME,
        )
        write_json(self.path / "judge.json", rules)
        names = {JUDGE_VARIABLE: str(self.path / "judge.json"), "LOCAL_LLM": judge.model, "OPENAI_API_KEY": "elsewhere"}
        # The way to the judge, and the key, which our process there takes away before VLMEvalKit is imported.
        return names | {
            name: value
            for name, value in os.environ.items()
            if name.lower().endswith("_proxy") or name in (KEY_VARIABLE, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        }

    def newest_run(self) -> Path:
        """What the last start wrote. Raises EvaluationError when it came to nothing."""
        return outcome.newest_run(self.outputs / self.model.role, self._earlier_runs)

    def _start_until(self, check: Callable[[], None], arguments: list[str], extra: Mapping[str, str]) -> None:
        """Start VLMEvalKit until what it wrote passes the check. Raises the last reason why it does not."""
        config = ["--config", str(self.path / "config.json"), "--work-dir", str(self.outputs), "--keep-failed"]
        counted = [(entry.config.name, self.answers_path(entry), len(entry.table.rows)) for entry in self.asked]
        told = Meter(self.run, counted)
        for start in range(1, MAX_STARTS + 1):
            (self.answers / FAILURE_NAME).unlink(missing_ok=True)
            self._earlier_runs = outcome.run_directories(self.outputs / self.model.role)
            # The first start judges anew; one that follows a death goes on from what was judged.
            reuse = ["--reuse-aux", "infer" if start == 1 else "all"]
            end = run_once(
                self.installation,
                [*config, *arguments, *reuse],
                environment(self.path, self.data, extra),
                self.path,
                Deadline(self.config.vlmevalkit.stall_timeout_seconds, self._end),
                told.tell,
            )
            self._raise_failure()
            try:
                return check()
            except EvaluationError as error:
                self._give_up_or_go_on(error, end, start)

    def _give_up_or_go_on(self, error: EvaluationError, end: End, start: int) -> None:
        died = end.why == "stalled" or end.exit_code != 0
        if end.why == "too long" or not died or start == MAX_STARTS:
            reason = f"{error.message} ({end}; see {self.path / LOG_NAME})"
            raise EvaluationError(reason, hint="what was answered is kept: evaluate again to go on") from error
        log.warning("VLMEvalKit, start %d of %d: %s (%s); starting again", start, MAX_STARTS, error.message, end)

    def _raise_failure(self) -> None:
        """What our model class raised in VLMEvalKit's process, as what it is."""
        path = self.answers / FAILURE_NAME
        if path.is_file():
            failure = json.loads(path.read_bytes())
            error_class = getattr(errors, failure["class"], EvaluationError)
            assert issubclass(error_class, VlmDftError)
            raise error_class(failure["message"], param=failure["param"])

    def _check_inference(self) -> None:
        run = self.newest_run()
        for entry in self.asked:
            outcome.check_status(run, entry.table)
            answers = self.answers_of(entry)
            if missing := entry.table.rows.keys() - answers.keys():
                raise EvaluationError(f"{len(missing)} items of {entry.config.name} have no answer")
            outcome.check_predictions(run, entry.table, answers)

    def _check_scoring(self) -> None:
        run = self.newest_run()
        for entry in self.asked:
            outcome.check_status(run, entry.table)
            grades = outcome.read_grades(run, entry.table, self.judge_file_name)
            outcome.check_score(run, entry.table, self.judge_file_name, grades)


def _tokenizer_directory(path: Path) -> Path:
    """An adapter's tokenizer is its base's."""
    return locate(*adapter_base(path)) if (path / ADAPTER_CONFIG).is_file() else path


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
