"""Validation as the worker runs it, in a process of its own: without torch, within its memory, saying how far it is."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import data_uri, image_part, jsonl, openai_row, picture, validated
from throwaway import run_python, wait_until

from vlm_dft.config import RunConfig, ValidationConfig
from vlm_dft.data import validation
from vlm_dft.data.process import memory_limit
from vlm_dft.results import Progress
from vlm_dft.run_dir import RunDir

SCRIPT = """
import re, sys
from pathlib import Path
from vlm_dft.data import validation
from vlm_dft.run_dir import RunDir
validation.MEMORY_BYTES = int(sys.argv[2]) * 2**20
run = RunDir(Path(sys.argv[1]))
report = validation.validate(run.read_config().validation, run)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(report.valid, [p.code for p in report.problems], int(peak[1]) // 1024)
"""


def in_process(tmp_path: Path, data: bytes, *, memory_mib: int = 4096, **options) -> tuple[str, int]:
    """(what was found, peak MiB) of a validation in a process of its own."""
    run = run_of(tmp_path, data, **options)
    done = run_python("-W", "error", "-c", SCRIPT, str(run.path), str(memory_mib))
    assert done.returncode == 0, done.stderr
    found, _, peak = done.stdout.strip().rpartition(" ")
    return found, int(peak)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured on Linux only")


def run_of(tmp_path: Path, data: bytes, **options) -> RunDir:
    (tmp_path / "upload").write_bytes(data)
    run = RunDir(tmp_path / "run")
    config = ValidationConfig(source=tmp_path / "upload", filename="rows.jsonl", **options)
    run.create(RunConfig(run_id="file-1", validation=config))
    return run


def test_it_counts_tokens_without_torch(tmp_path: Path, tiny_vlm: Path) -> None:
    row = openai_row([image_part(data_uri(picture()))], "A circle.")
    run = run_of(tmp_path, jsonl(row), tokenizer=str(tiny_vlm))
    done = run_python("-X", "importtime", "-m", "vlm_dft", str(run.path))
    assert done.returncode == 0, done.stderr
    result = run.read_result()
    assert result is not None
    assert result.validation is not None
    assert (result.status, result.validation.valid) == ("succeeded", 1)
    assert result.validation.tokens is not None
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "transformers" in imported
    assert not imported & {"torch", "torchvision", "qwen_vl_utils"}


def test_a_refused_file_ends_as_a_failed_run_with_its_report(tmp_path: Path) -> None:
    run = run_of(tmp_path, jsonl(openai_row(), b"{broken"))
    assert run_python("-m", "vlm_dft", str(run.path)).returncode == 1
    result = run.read_result()
    assert result is not None
    assert result.error is not None
    assert result.validation is not None
    assert (result.error.code, result.error.category) == ("invalid_training_file", "user")
    assert "line 2: the row is no JSON" in result.error.message
    assert (result.validation.invalid, result.validation.dataset) == (1, None)


def test_a_terminated_validation_leaves_no_half_dataset(tmp_path: Path) -> None:
    run = run_of(tmp_path, jsonl(*[openai_row(f"{n}?", f"{n}.") for n in range(100_000)]))
    process = subprocess.Popen([sys.executable, "-m", "vlm_dft", str(run.path)], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (run.read_progress() or Progress(phase="starting")).items_done, 30, "rows are read")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
    finally:
        process.kill()
        process.wait()
    assert sorted(entry.name for entry in run.path.iterdir()) == ["config.json", "progress.json", "result.json"]


def test_a_nine_kilobyte_bomb_costs_a_row_and_no_memory(tmp_path: Path) -> None:
    bomb = openai_row([image_part(data_uri(picture(8600, 8600, mode="1", optimize=True)))], "Black.")
    found, peak = in_process(tmp_path, jsonl(bomb, openai_row()))
    assert found == "1 ['image_too_many_pixels']"
    assert peak < 200


def test_memory_is_limited_and_given_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(64 * 2**20), pytest.raises(MemoryError):
        bytearray(256 * 2**20)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(256 * 2**20)) == 256 * 2**20


def test_a_picture_that_breaks_the_memory_limit_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """Allowed by its pixels, but the process has no room for it."""
    large = openai_row([image_part(data_uri(picture(6300, 6300, mode="RGB", compress_level=9)))], "Black.")
    data = jsonl(large, openai_row())
    assert in_process(tmp_path, data, memory_mib=100)[0] == "1 ['image_needs_too_much_memory']"
    assert in_process(tmp_path, data, memory_mib=1000, max_invalid_fraction=0.5)[0] == "2 []"


def test_progress_is_told_while_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Progress] = []
    monkeypatch.setattr(validation, "_PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(RunDir, "write_progress", lambda _, progress: told.append(progress))
    validated(tmp_path, jsonl(*[openai_row()] * 20))
    assert [progress.items_done for progress in told] == [0, *range(1, 21), 20]
    assert {progress.items_total for progress in told[1:]} == {20}
    remaining = told[-1].seconds_remaining
    assert remaining == 0
    assert all(progress.phase == "validating" for progress in told)
