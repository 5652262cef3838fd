"""Which backend scores which benchmark, and what is said when the one asked for cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vlmevalkit_fixtures import eval_config, fake_installation, wemath_benchmark

from vlm_dft.config import BenchmarkConfig
from vlm_dft.errors import BenchmarkError, ConfigError
from vlm_dft.evaluation import backends
from vlm_dft.evaluation.vlmevalkit import work as working
from vlm_dft.evaluation.vlmevalkit.installation import Installation
from vlm_dft.run_dir import RunDir


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wemath_benchmark(tmp_path_factory.mktemp("wemath") / "wemath")


def starts(installation: Installation, mode: str) -> int:
    path = installation.root / f"{mode}.starts"
    return int(path.read_text()) if path.exists() else 0


def choose(benchmark: Path, backend_name: str, kind: str = "wemath", **settings: Any) -> list[str]:
    config = eval_config(benchmark).model_copy(update={"backend": backend_name, **settings})
    entry = BenchmarkConfig(name=kind, kind=kind, path=benchmark)  # type: ignore[arg-type]
    config = config.model_copy(update={"benchmarks": (*config.benchmarks, entry)})
    _, chosen = backends.choose(config)
    return [entry.config.name for entry in chosen]


def test_without_vlmevalkit_auto_is_native_and_asking_for_it_says_what_to_install(
    benchmark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLM_DFT_VLMEVAL_PYTHON", raising=False)
    monkeypatch.delenv("VLM_DFT_VLMEVAL_ROOT", raising=False)
    assert choose(benchmark, "auto") == choose(benchmark, "native") == []
    with pytest.raises(ConfigError, match="VLM_DFT_VLMEVAL_PYTHON and VLM_DFT_VLMEVAL_ROOT are not set") as caught:
        choose(benchmark, "vlmevalkit")
    assert "pip install" in (caught.value.hint or "")
    assert caught.value.param == "evaluation.backend"


def test_what_vlmevalkit_cannot_score_without_a_judge_is_refused_by_name_or_scored_natively(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "find_installation", lambda: fake_installation(tmp_path))
    with pytest.raises(ConfigError, match="mathverse: VLMEvalKit cannot score MathVerse without a judge"):
        choose(benchmark, "vlmevalkit", "mathverse")
    monkeypatch.setattr(backends, "find_installation", lambda: fake_installation(tmp_path / "b"))
    assert choose(benchmark, "auto", "mathvision") == ["wemath"]
    assert "mathvision is scored natively: VLMEvalKit cannot score MathVision without a judge" in caplog.text


def test_a_benchmark_with_an_item_without_picture_is_scored_natively_or_refused(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MathVerse's sixth version has no pictures, and VLMEvalKit would leave its items out without a word."""
    plain = working.load_benchmark

    def without_last_picture(*arguments: Any) -> Any:
        whole = plain(*arguments)
        return replace(whole, items=(*whole.items[:-1], replace(whole.items[-1], picture=None)))

    installation = fake_installation(tmp_path)
    monkeypatch.setattr(backends, "find_installation", lambda: installation)
    monkeypatch.setattr(working, "load_benchmark", without_last_picture)
    config = eval_config(benchmark)
    with pytest.raises(ConfigError, match="wemath: VLMEvalKit asks about pictures, and item 7:3steps_multi has none"):
        backends.choose(config)
    assert backends.choose(config.model_copy(update={"backend": "auto"})) == (installation, [])


def test_a_bad_benchmark_fails_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation = fake_installation(tmp_path)
    monkeypatch.setattr(backends, "find_installation", lambda: installation)
    with pytest.raises(BenchmarkError, match="wemath is not at"):
        backends.evaluate(eval_config(tmp_path / "absent"), RunDir(tmp_path), tuned="/no/model", base=None)
    assert starts(installation, "infer") == 0
