"""`python -m vlm_dft RUN_DIR`: what it leaves behind and how it exits, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from datasets_for_tests import sums_dataset
from processes_for_tests import exit_code, start_trainer
from throwaway import run_python, wait_until

from vlm_dft import __main__ as command
from vlm_dft.config import RunConfig, SupervisionConfig, TrainConfig, ValidationConfig
from vlm_dft.interruption import Interrupted, StopRequest
from vlm_dft.results import RunResult
from vlm_dft.run_dir import RunDir
from vlm_dft.watchdog import EXIT_ABANDONED

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train_run(path: Path, model: Path, *, supervision: SupervisionConfig | None = None, **settings) -> RunDir:
    dataset = sums_dataset(path.parent / f"{path.name}-dataset", 6)
    train = TrainConfig(model=str(model), dataset=dataset, precision="fp32", **({"batch_size": 2} | settings))
    run = RunDir(path)
    run.create(RunConfig(run_id="test", train=train, supervision=supervision))
    return run


def result_of(run: RunDir) -> RunResult:
    result = run.read_result()
    assert result is not None, run.log_tail()
    return result


@pytest.mark.e2e
def test_the_command_line_trains_and_exports(tiny_qwen2: Path, tmp_path: Path):
    run = train_run(tmp_path / "run", tiny_qwen2, max_steps=2)
    done = run_python("-m", "vlm_dft", str(run.path), env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-000002" in done.stdout  # by hand, the log is on the terminal
    result = result_of(run)
    assert result.status == "succeeded"
    assert result.train is not None
    assert (run.path / result.train.export / "model.safetensors").is_file()


@pytest.mark.e2e
def test_under_torchrun_the_first_rank_speaks(tiny_qwen2: Path, tmp_path: Path):
    run = train_run(tmp_path / "run", tiny_qwen2, max_steps=2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vlm_dft", str(run.path)]
    done = run_python(*torchrun, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(run).status == "succeeded"
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_a_training_that_fails_says_why_in_its_result(tiny_qwen2: Path, tmp_path: Path):
    run = train_run(tmp_path / "run", tiny_qwen2, max_length_tokens=8)
    assert exit_code(start_trainer(run)) == 1
    result = result_of(run)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.code, result.error.param) == ("sample_too_long", "train.max_length_tokens")
    assert "SampleTooLongError" in run.log_tail()


def test_a_config_that_cannot_be_read_is_a_result_too(tmp_path: Path):
    run = RunDir(tmp_path)
    run.config_path.write_text(json.dumps({"run_id": "x", "train": {"model": "m", "dataset": "d", "epochs": 3}}))
    assert exit_code(start_trainer(run)) == 1
    error = result_of(run).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_config", "train.epochs")


def test_a_crash_leaves_no_result_and_a_traceback(tiny_qwen2: Path, tmp_path: Path):
    run = train_run(tmp_path / "run", tiny_qwen2, max_steps=2)
    run.write_result(RunResult(status="succeeded"))  # an older attempt's
    run.export_path.write_text("a file where the export should go")
    run.checkpoints_path.write_text("a file where the checkpoints should go")
    assert exit_code(start_trainer(run)) == 1
    assert run.read_result() is None
    assert "Traceback" in run.log_tail()


def test_a_missing_run_directory_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main([str(tmp_path / "absent")]) == 2
    assert "is not a directory" in capsys.readouterr().err


def test_asked_to_stop_while_loading_it_ends_as_interrupted(tiny_qwen2: Path, tmp_path: Path):
    run = train_run(tmp_path / "run", tiny_qwen2, max_steps=10_000)
    process = start_trainer(run)
    wait_until(lambda: run.read_progress() is not None, 60, "it has begun")
    process.terminate()
    assert exit_code(process) == 75
    assert result_of(run).status == "interrupted"


@pytest.mark.chaos
def test_a_rank_whose_lease_is_not_renewed_ends_itself(tiny_qwen2: Path, tmp_path: Path):
    supervision = SupervisionConfig(lease_timeout_seconds=1.5)
    run = train_run(tmp_path / "run", tiny_qwen2, max_steps=100_000, supervision=supervision)
    run.write_lease(0)
    process = start_trainer(run)
    for counter in range(1, 30):
        run.write_lease(counter)
        time.sleep(0.1)
    assert process.is_alive()
    assert exit_code(process, 30) == EXIT_ABANDONED
    assert run.read_result() is None


def test_validations_run_without_torch(tmp_path: Path):
    source = tmp_path / "data.jsonl"
    good = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    source.write_text(json.dumps(good) + "\n")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from vlm_dft.__main__ import main\n"
        "raise SystemExit(main(sys.argv[1:]))"
    )
    accepted, refused = RunDir(tmp_path / "accepted"), RunDir(tmp_path / "refused")
    accepted.create(RunConfig(run_id="a", validation=ValidationConfig(source=source, filename="data.jsonl")))
    assert run_python("-c", script, str(accepted.path)).returncode == 0
    result = result_of(accepted)
    assert result.validation is not None
    assert (result.status, result.validation.valid, result.validation.dataset) == ("succeeded", 1, "dataset")
    with source.open("a") as file:
        file.write(json.dumps({"messages": "hello"}) + "\n")
    refused.create(RunConfig(run_id="r", validation=ValidationConfig(source=source, filename="data.jsonl")))
    assert run_python("-c", script, str(refused.path)).returncode == 1
    result = result_of(refused)
    assert result.error is not None
    assert result.validation is not None
    assert (result.status, result.error.code) == ("failed", "invalid_training_file")
    assert "1 of 2 rows are invalid" in result.error.message
    assert (result.validation.invalid, result.validation.dataset) == (1, None)


def test_a_failing_evaluation_does_not_fail_the_training(tiny_qwen2: Path, tmp_path: Path):
    run = train_run(tmp_path / "run", tiny_qwen2, max_steps=1)
    config = json.loads(run.config_path.read_text())
    benchmark = {"name": "wemath", "kind": "wemath", "path": str(tmp_path / "absent.json")}
    config["evaluation"] = {"benchmarks": [benchmark], "max_new_tokens": 4}
    run.config_path.write_text(json.dumps(config))
    assert exit_code(start_trainer(run)) == 0
    result = result_of(run)
    assert result.status == "succeeded"
    assert result.train is not None
    assert result.evaluation_error is not None
    assert result.evaluation_error.code == "benchmark_unavailable"


def test_a_stop_request_waits_for_a_good_place():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    try:
        stop.install()
        with stop.put_off():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_fails_the_run_and_keeps_the_last_checkpoint(tiny_qwen2: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = train_run(disk / "run", tiny_qwen2, max_steps=20, checkpoint_every_steps=1, keep_checkpoints=20)
        assert exit_code(start_trainer(run)) == 1
        error = result_of(run).error
        assert error is not None
        assert error.code == "disk_full"
        checkpoints = run.complete_checkpoints()
        assert checkpoints
        assert not list(run.checkpoints_path.glob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
