"""The demo as it runs: real data, service, worker, trainer and client, made small; and how it fails."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cli import demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]


def test_small_demo_does_every_step_and_says_that_so_little_teaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZES", {"--train": 16, "--tune": 16, "--validation": 4, "--held-out": 6})
    monkeypatch.setattr(demo, "START", {"learning_rate": 1e-3, "n_epochs": 1})
    monkeypatch.setattr(demo, "TUNE", {"learning_rate": 1e-3, "n_epochs": 1})
    assert demo.demo(tmp_path) == 1
    printed = capsys.readouterr()
    assert "start.tar.gz: 16 of 16 rows valid, 16 images" in printed.out
    for label in ("chance", "base (random)", "start = base+SFT", "start + SFT", "start + DFT"):
        assert f"| {label} " in printed.out
    assert "right of 18" in printed.out
    assert "not clearly above" in printed.err
    with closing(sqlite3.connect(tmp_path / "service" / "vlm-dft.db")) as database:
        jobs = database.execute(
            "SELECT phase, seed, json_extract(config, '$.train.objective.name') FROM jobs WHERE seed IS NOT NULL"
        )
        assert sorted(jobs) == [("succeeded", 0, "dft"), ("succeeded", 0, "nll"), ("succeeded", 0, "nll")]
        parents = [parent for (parent,) in database.execute("SELECT parent FROM models ORDER BY created_at")]
    assert parents[0] == demo.BASE
    assert parents[1] == parents[2]
    assert parents[1].startswith(f"ft:{demo.BASE}:default:start:")


def test_failing_step_ends_the_demo_and_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZES", {"--held-out": 7})
    assert demo.demo(tmp_path) == 1
    assert "data.log" in capsys.readouterr().err
    assert "multiple of 3" in (tmp_path / "data.log").read_text()


def test_service_that_cannot_start_ends_the_demo_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZES", {"--train": 4, "--tune": 4, "--validation": 4, "--held-out": 3})
    (tmp_path / "service").write_text("a file where the data directory should be")
    assert demo.demo(tmp_path) == 1
    assert "up.log" in capsys.readouterr().err
