"""Which backend answers and scores each benchmark: VLMEvalKit's process, or our own code. Torch-free.

``auto`` takes VLMEvalKit where it is installed and can score the benchmark as it is configured, and says so where it
does not; each score names its scorer. ``vlmevalkit`` refuses what it cannot do. Knows nothing about how either works.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vlm_dft.config import EvalConfig
from vlm_dft.errors import ConfigError
from vlm_dft.evaluation.answering import Role
from vlm_dft.evaluation.contamination import report_overlaps
from vlm_dft.evaluation.item_files import keep_items, pictures_dir
from vlm_dft.evaluation.judge import Judge
from vlm_dft.evaluation.provision import check_published
from vlm_dft.evaluation.score_cache import ScoreCache
from vlm_dft.evaluation.vlmevalkit.installation import Installation, Unavailable, find_installation
from vlm_dft.evaluation.vlmevalkit.tables import refusal, without_picture
from vlm_dft.evaluation.vlmevalkit.work import Asked, read_benchmark
from vlm_dft.results import Score
from vlm_dft.run_dir import RunDir

log = logging.getLogger(__name__)


def evaluate(
    config: EvalConfig, run: RunDir, *, tuned: str, base: str | None, base_revision: str | None = None
) -> tuple[Score, ...]:
    """Scores of tuned, then of base if given, each in the order of the benchmarks.

    Raises ConfigError for a backend that cannot be used, and what the backends raise.
    """
    _check_directories(config, run)
    for entry in config.benchmarks:
        check_published(entry)
    # Read first: a benchmark that cannot be read costs nothing before any model is loaded.
    installation, asked = choose(config)
    if asked and config.judge is not None:
        Judge(config.judge, (config.score_cache or run.path / "evaluation") / "judge").preflight()
    names = {entry.config.name for entry in asked}
    others = tuple(entry for entry in config.benchmarks if entry.name not in names)
    found: dict[tuple[Role, str], Score] = {}
    if others:
        from vlm_dft.evaluation import runner

        native = config.model_copy(update={"benchmarks": others})
        scores = runner.evaluate(native, run, tuned=tuned, base=base, base_revision=base_revision)
        found |= {(score.model_role, score.benchmark): score for score in scores}
    if installation is not None and asked:
        for entry in asked:
            keep_items(run, entry.config.name, entry.chosen, pictures_dir(config))
        scores = _vlmevalkit(config, run, installation, asked, tuned, base, base_revision)
        found |= {(score.model_role, score.benchmark): score for score in scores}
    if config.score_cache is not None:
        ScoreCache(config.score_cache).make_room(config.score_cache_gib)
    roles: list[Role] = ["tuned", *(["base"] if base is not None else [])]
    return tuple(found[role, entry.name] for role in roles for entry in config.benchmarks)


def choose(config: EvalConfig) -> tuple[Installation | None, list[Asked]]:
    """VLMEvalKit where it is used, and the benchmarks that it gets, read.

    Raises ConfigError when it must be used and cannot, BenchmarkError for a benchmark that cannot be read.
    """
    if config.backend == "native":
        return None, []
    found = find_installation()
    if isinstance(found, Unavailable):
        if config.backend == "vlmevalkit":
            raise ConfigError(
                f"the backend vlmevalkit cannot be used: {found.reason}", param="evaluation.backend", hint=found.remedy
            )
        if found.is_configured:
            log.warning("native scoring, because VLMEvalKit cannot be used: %s; %s", found.reason, found.remedy)
        return None, []
    chosen = []
    for position, entry in enumerate(config.benchmarks):
        reason = refusal(config, entry)
        asked = read_benchmark(config, position, entry) if reason is None else None
        if asked is not None and (item := without_picture(asked.chosen)):
            reason = f"VLMEvalKit asks about pictures, and item {item.id} has none"
        if asked is not None and reason is None:
            chosen.append(asked)
        elif config.backend == "vlmevalkit":
            raise ConfigError(f"{entry.name}: {reason}; the backend native can", param="evaluation.backend")
        else:
            log.warning("%s is scored natively: %s", entry.name, reason)
    return found, chosen


def _check_directories(config: EvalConfig, run: RunDir) -> None:
    directories: dict[str, str] = {}
    for entry in config.benchmarks:
        path = str(run.evaluation_path("tuned", entry.name))
        if path in directories:
            names = f"{directories[path]!r} and {entry.name!r}"
            raise ConfigError(
                f"the benchmarks {names} would write to the same directory: rename one", param="evaluation.benchmarks"
            )
        directories[path] = entry.name


def _vlmevalkit(
    config: EvalConfig,
    run: RunDir,
    installation: Installation,
    asked: Sequence[Asked],
    tuned: str,
    base: str | None,
    base_revision: str | None,
) -> list[Score]:
    from vlm_dft.evaluation.vlmevalkit import backend

    sources: list[tuple[Role, str, str | None]] = [("tuned", tuned, config.revision if config.model else None)]
    if base is not None:
        sources.append(("base", base, base_revision))
    overlaps = report_overlaps(config, run, {entry.config.name: entry.chosen for entry in asked})
    scores: list[Score] = []
    for role, source, revision in sources:
        scores += backend.evaluate(
            config, run, installation, asked, overlaps, role=role, source=source, revision=revision
        )
    return scores
