"""The regression set is the same everywhere, can be read as any benchmark, and its right answers score as right."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.benchmarks import benchmarks_app
from service.settings import get_settings
from vlm_dft.config import BenchmarkConfig
from vlm_dft.evaluation import custom
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.regression import OF_EACH, write


def test_the_set_holds_as_many_of_each_kind_and_is_drawn_the_same_twice(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) == 1 + 2 * OF_EACH
    assert all((tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes() for path in files)
    items = custom.load(tmp_path / "first", "direct").items
    kinds = [item.categories["category"] for item in items]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("facts", "ocr", "general"), OF_EACH)
    assert len({(item.asked, item.answer, item.id) for item in items}) == 3 * OF_EACH
    for item in items:
        assert (item.picture is None) == (item.categories["category"] == "facts")


def test_reference_answers_are_right_and_others_wrong(tmp_path: Path) -> None:
    write(tmp_path / "set")
    with LatexProcess() as latex:
        for item in custom.load(tmp_path / "set", "direct").items:
            assert custom.grade(item, f"\\boxed{{{item.answer}}}", latex).correct, item.id
            assert not custom.grade(item, "\\boxed{Z}", latex).correct, item.id


def test_the_command_puts_it_among_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_DFT_BENCHMARKS", str(tmp_path))
    get_settings.cache_clear()
    try:
        answer = CliRunner().invoke(benchmarks_app, ["regression"])
        assert answer.exit_code == 0, answer.output
        assert "60 items, 40 with pictures" in answer.output
        assert CliRunner().invoke(benchmarks_app, ["regression"]).exit_code == 1
    finally:
        get_settings.cache_clear()
    config = BenchmarkConfig(name="regression", kind="custom", path=tmp_path / "regression")
    assert len(load_benchmark(config, "direct").items) == 60
