"""Two arms of an experiment share their base's score, and nothing else ever takes its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import colour_benchmark, diverse_vlm
from PIL import Image
from test_evaluation_report import score
from test_evaluation_runs import config, new_run

from vlm_dft.config import PixelConfig
from vlm_dft.evaluation import comparable, evaluate
from vlm_dft.evaluation.generation import Generator
from vlm_dft.evaluation.predictions import Prediction, read_predictions
from vlm_dft.evaluation.score_cache import ScoreCache
from vlm_dft.model_files import model_sha256
from vlm_dft.run_dir import RunDir
from vlm_dft.tiny import build_tiny_vlm


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_benchmark(tmp_path_factory.mktemp("colours") / "colours", num_items=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diverse_vlm(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hash of the model for each answer that is really generated."""
    hashes: list[str] = []
    stream = Generator.stream

    def counted(self: Generator, items: Any, samples: Any = None) -> Any:
        hashes.extend(item.id for item in items)
        return stream(self, items, samples)

    monkeypatch.setattr(Generator, "stream", counted)
    return hashes


def run_of(path: Path, benchmark: Path, tuned: Path, base: Path | None, cache: Path, **changes: Any) -> Any:
    run = new_run(path)
    settings = config(benchmark, score_cache=cache, **changes)
    return run, evaluate(settings, run, tuned=str(tuned), base=str(base) if base else None)


def test_two_arms_share_one_base_run(benchmark: Path, base: Path, tmp_path: Path, generated: list[str]) -> None:
    cache = tmp_path / "scores"
    arms = [build_tiny_vlm(tmp_path / f"arm-{seed}", seed=seed, initializer_range=0.4) for seed in (1, 2)]
    first_run, (sft, first) = run_of(tmp_path / "sft", benchmark, arms[0], base, cache)
    assert (len(generated), first.from_cache, sft.from_cache) == (8, False, False)
    second_run, (dft, second) = run_of(tmp_path / "dft", benchmark, arms[1], base, cache)
    assert (len(generated), second.from_cache, dft.from_cache) == (12, True, False)
    assert (second.value, second.model_sha256) == (first.value, model_sha256(base))
    assert comparable(first, second) is None
    assert comparable(second, dft) is None
    both = [read_predictions(RunDir(run.path).evaluation_path("base", "colours")) for run in (first_run, second_run)]
    assert sorted(both[0], key=lambda p: p.id) == sorted(both[1], key=lambda p: p.id)
    assert (second_run.path / second.predictions).is_file()
    _, (alone,) = run_of(tmp_path / "alone", benchmark, base, None, cache)
    assert (len(generated), alone.from_cache, alone.model_role) == (12, True, "tuned")


def test_what_was_not_used_for_longest_makes_room_and_no_run_loses_anything(
    benchmark: Path, base: Path, tmp_path: Path, generated: list[str]
) -> None:
    cache = tmp_path / "scores"
    runs = [run_of(tmp_path / f"run-{n}", benchmark, base, None, cache, max_new_tokens=n)[0] for n in (2, 3)]
    old, new = sorted(cache.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    (cache / "judge" / "ab").mkdir(parents=True)
    verdict = cache / "judge" / "ab" / "verdict.json"
    verdict.write_bytes(b"x" * 1000)
    for path, seconds in ((verdict, 1), (old, 2), (new, 3)):
        os.utime(path, (seconds, seconds))
    room = (old.stat().st_size + new.stat().st_size) / 2**30
    assert ScoreCache(cache).make_room(room) == [verdict]
    runs.append(run_of(tmp_path / "again", benchmark, base, None, cache, max_new_tokens=2)[0])  # uses the old one
    assert ScoreCache(cache).make_room(room / 2**20) == [new, old]
    assert ScoreCache(cache).make_room(room / 2**20) == [], "the pictures are linked by runs, and take no room"
    for run in runs:
        assert len(read_predictions(run.evaluation_path("tuned", "colours"))) == 4
        assert len(list((run.items_path("colours") / "pictures").iterdir())) == 4
    for run in runs:
        shutil.rmtree(run.path)
    assert len(ScoreCache(cache).make_room(room / 2**20)) == 4, "nobody has them any more"
    answered = len(generated)
    _, (score,) = run_of(tmp_path / "later", benchmark, base, None, cache, max_new_tokens=2, score_cache_gib=1e-9)
    assert (score.from_cache, len(generated) - answered) == (False, 4)
    assert list(cache.glob("*.jsonl")) == [], "an evaluation makes room when it ends"


def test_nothing_else_is_taken_for_it(benchmark: Path, base: Path, tmp_path: Path, generated: list[str]) -> None:
    """Other settings, other items, another picture, another tokenizer or configuration: each is a score of its own."""
    cache = tmp_path / "scores"
    changed = shutil.copytree(benchmark, tmp_path / "changed")
    Image.new("RGB", (56, 56), "pink").save(changed / "images" / "0.png")
    other = shutil.copytree(base, tmp_path / "other")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"vocab_size"', '"vocab_size" ', 1))
    runs: list[tuple[Path, Path, dict[str, Any]]] = [
        (benchmark, base, {}),
        (benchmark, base, {"max_new_tokens": 5}),
        (benchmark, base, {"limit": 2}),
        (benchmark, base, {"temperature": 0.7, "pixels": PixelConfig(max_pixels=8 * 28 * 28)}),
        (changed, base, {}),
        (benchmark, other, {}),
    ]
    for number, (items, model, changes) in enumerate(runs):
        before = len(generated)
        _, (score,) = run_of(tmp_path / f"run-{number}", items, model, None, cache, **changes)
        assert (score.from_cache, len(generated) > before) == (False, True), changes
    assert len(list(cache.glob("*.jsonl"))) == len(runs)


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json\n", None])
def test_a_damaged_entry_counts_as_none(tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    cache, identity = ScoreCache(tmp_path / "scores"), {"model_sha256": "a", "pixels": {"max_pixels": 1}}
    prediction = Prediction(
        id="1",
        prompt="q",
        prediction="a",
        extracted=None,
        rule="none",
        answer="b",
        correct=False,
        finish_reason="stop",
        num_generated_tokens=1,
    )
    cache.put(identity, score(), [prediction, prediction.model_copy(update={"id": "2"})])
    found = cache.find(identity)
    assert found is not None
    assert (found.score, [p.id for p in found.predictions]) == (score(), ["1", "2"])
    assert cache.find({**identity, "model_sha256": "b"}) is None
    assert not caplog.messages
    path = cache.path(identity)
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert cache.find(identity) is None
    assert "scoring anew" in caplog.messages[0]
    path.write_bytes(cache.path(identity).read_bytes())
    cache.put({"other": 1}, score(), [])
    cache.path({"other": 1}).rename(path)
    assert cache.find(identity) is None, "an entry under the wrong name is not believed"
