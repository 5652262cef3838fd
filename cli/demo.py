"""`vlm-dft demo`: the whole mission on this machine, in minutes on two cores.

Writes small image-text problems and a random tiny Qwen2.5-VL, starts the real service on a free port, and then is a
user of it with nothing but the stock openai client: an SFT job until the model has some competence, and from its result
a comparison of SFT and DFT, on the same data, in the same order, for as many steps. Ends with a table
(``demo_report``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from cli import demo_report
from cli.children import Child, Program, stop_all
from cli.client import EXIT_FAILED, err, get, out, post
from cli.compare import PATH as COMPARISONS
from cli.watch import follow
from vlm_dft.demo.wording import SYSTEM_PROMPT
from vlm_dft.errors import VlmDftError

BASE = "tiny-qwen2.5-vl"
SEED = 0
SIZES = {"--train": 4000, "--tune": 3000, "--validation": 200, "--held-out": 180}
HYPERPARAMETERS = {
    "batch_size": 32,
    "micro_batch_size": 32,
    "gradient_checkpointing": False,  # the model is tiny, and there are no minutes to lose
    "max_length_tokens": 512,
    "checkpoint_every_steps": 250,
    "log_every_steps": 10,
    "sample_max_new_tokens": 80,
}
START = {"learning_rate": 4e-3, "n_epochs": 4}
"""About half of the held-out answers right: clearly more than chance, and much left to learn."""
TUNE = {"learning_rate": 1e-3, "n_epochs": 3}
"""A lower rate, as for any model that already knows something; the same for SFT and DFT."""
READY_SECONDS = 180.0
STOP_SECONDS = 30.0
_POLL_SECONDS = 1.0


class DemoError(VlmDftError):
    """A step of the demo failed."""


def demo(data_dir: Path | None = None, keep: bool = False) -> int:
    """Run it; returns the exit code. data_dir: where everything is written; None: a new temporary directory."""
    began = time.monotonic()
    root = (data_dir or Path(tempfile.mkdtemp(prefix="vlm-dft-demo-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    out.print(f"The demo writes to {root}", highlight=False, soft_wrap=True)
    try:
        _write_data(root)
        with _service(root) as address, _client(address) as client:
            shown = _fine_tune_all(client, root)
            out.print(f"\nIn {time.monotonic() - began:.0f} s on {os.cpu_count()} cores:\n", highlight=False)
            demo_report.show(shown)
            page = f"{address}/#/comparisons/{shown.comparison['id']}"
            if keep:
                _wait_for_interrupt(address, page)
            else:
                out.print("\nTo look at it in the dashboard: make demo KEEP=1", highlight=False)
    except (VlmDftError, openai.OpenAIError) as error:
        err.print("[red]The demo failed.[/]", highlight=False)
        err.print(
            f"{error}\nLogs: {root}/*.log, {root}/service/logs, {root}/service/runs", markup=False, soft_wrap=True
        )
        return EXIT_FAILED
    return 0


def _write_data(root: Path) -> None:
    """The problems, the benchmarks and the base model, in a process of their own: torch stays out of this one."""
    arguments = [text for name, number in SIZES.items() for text in (name, str(number))]
    command = [sys.executable, "-m", "vlm_dft.demo", str(root / "data"), "--base", "--seed", str(SEED), *arguments]
    log = root / "data.log"
    with out.status("drawing problems and building a tiny random Qwen2.5-VL"), log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        raise DemoError(f"the data could not be written (exit code {code}): see {log}")
    out.print(log.read_text().rstrip(), highlight=False, soft_wrap=True)


@contextmanager
def _service(root: Path) -> Iterator[str]:
    """`vlm-dft up` on a free port; yields its address. Whatever VLM_DFT_* the user has set is another service's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLM_DFT_")}
    environment |= {
        # One thread for each of two trainers: with two, they would wait for each other more than they would gain.
        "OMP_NUM_THREADS": "1",
        "VLM_DFT_DATA_DIR": str(root / "service"),
        "VLM_DFT_MODELS_DIR": str(root / "data" / "models"),
        "VLM_DFT_BENCHMARKS": str(root / "data" / "benchmarks"),
    }
    log = root / "up.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "cli.main", "up", "--port", "0", "--gpu-workers", "2"]
    child = Child(Program("service", command, environment, log), lambda line: None)
    child.tend()
    try:
        with out.status("starting the service"):
            address = _address(child, log)
        out.print(f"The service is ready at {address}", highlight=False)
        yield address
    finally:
        out.print("Stopping the service", highlight=False)
        stop_all([child], STOP_SECONDS, hurry=lambda: False)


def _address(child: Child, log: Path) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and not child.has_ended():
        if found := re.search(r"is ready at (\S+)", log.read_text()):
            return found[1]
        time.sleep(0.2)
    raise DemoError(f"the service did not start: see {log}")


def _client(address: str) -> openai.OpenAI:
    # A proxy from the environment would not find the way to this machine's own loopback.
    return openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
    )


def _fine_tune_all(client: openai.OpenAI, root: Path) -> demo_report.Demo:
    files = {name: _upload(client, root / "data" / f"{name}.tar.gz") for name in ("start", "tune", "validation")}
    benchmarks = json.loads((root / "data" / "demo.json").read_bytes())["benchmarks"]

    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=files["start"],
        validation_file=files["validation"],
        suffix="start",
        seed=SEED,
        method=_method(START, objective="sft"),  # pyright: ignore[reportArgumentType] - our keys
        extra_body={"evaluation": _evaluation(list(benchmarks))},
    )
    out.print(f"start: {job.id}, SFT from {BASE}", highlight=False)
    start = _finished(client, job.id)
    comparison = _compare(client, start["fine_tuned_model"], files, list(benchmarks))
    sft, dft = [_finished(client, arm["job_id"]) for arm in comparison["arms"]]
    return demo_report.Demo(
        start=start,
        sft=sft,
        dft=dft,
        comparison=get(client, f"{COMPARISONS}/{comparison['id']}"),
        chance={name: b["chance"] for name, b in benchmarks.items()},
    )


def _compare(client: openai.OpenAI, tuned: str, files: dict[str, str], benchmarks: list[str]) -> dict[str, Any]:
    """SFT and DFT from the tuned model, on equal terms: one request, same data, order and number of steps."""
    job = {
        "model": tuned,
        "training_file": files["tune"],
        "validation_file": files["validation"],
        "seed": SEED,
        "method": _method(TUNE),
        "evaluation": _evaluation(benchmarks),
    }
    arms = [{"name": objective, "objective": objective} for objective in ("sft", "dft")]
    comparison = post(client, COMPARISONS, {"name": "SFT or DFT", "job": job, "arms": arms})
    out.print(f"comparison {comparison['id']} from {tuned}", highlight=False)
    return comparison


def _method(numbers: dict[str, Any], **objective: str) -> dict[str, Any]:
    """Full fine-tuning: random vision weights have to be trained, too. An arm says its objective itself."""
    supervised = {
        **objective,
        "hyperparameters": HYPERPARAMETERS | numbers,
        "freeze": {"vision_tower": False, "merger": False, "language_model": False},
    }
    return {"type": "supervised", "supervised": supervised}


def _evaluation(benchmarks: list[str]) -> dict[str, Any]:
    return {
        "benchmarks": benchmarks,
        "include_base": True,
        "system_prompt": SYSTEM_PROMPT,
        "max_new_tokens": 80,
        "batch_size": 60,
    }


def _upload(client: openai.OpenAI, path: Path) -> str:
    """File id of the validated archive."""
    with path.open("rb") as file:
        uploaded = client.files.create(
            file=(path.name, file), purpose="fine-tune", extra_body={"system_prompt": SYSTEM_PROMPT}
        )
    with out.status(f"validating {path.name}"):
        checked = client.files.wait_for_processing(uploaded.id, poll_interval=0.5)
    if checked.status != "processed":
        raise DemoError(f"{path.name} was refused: {checked.status_details}")
    report = get(client, f"/files/{checked.id}")["validation_report"]
    counts = f"{report['valid']} of {report['rows']} rows valid, {report['images']} images"
    out.print(f"{path.name}: {counts}, {report['tokens']['total']['total']:,} tokens", highlight=False)
    return checked.id


def _finished(client: openai.OpenAI, job_id: str) -> dict[str, Any]:
    """Follow a job to its end, and look at what it left behind. Raises DemoError unless all of it is there."""
    out.rule(job_id)
    job = follow(client, job_id, _POLL_SECONDS)
    if job["status"] != "succeeded":
        raise DemoError(f"{job_id} {job['status']}: {(job['error'] or {}).get('message')}")
    if job["evaluation_error"]:
        raise DemoError(f"the evaluation of {job_id} failed: {job['evaluation_error']['message']}")
    events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job_id))
    if not events or not checkpoints:
        raise DemoError(f"{job_id} has {len(events)} events and {len(checkpoints)} checkpoints")
    if job["fine_tuned_model"] not in {model.id for model in client.models.list()}:
        raise DemoError(f"{job['fine_tuned_model']} is not in the list of models")
    names = ", ".join(str(checkpoint.step_number) for checkpoint in checkpoints)
    out.print(f"{len(events)} events; checkpoints at steps {names}; the model is listed", highlight=False)
    return job


def _wait_for_interrupt(address: str, page: str) -> None:
    out.print(f"\nThe comparison: {page}", highlight=False, soft_wrap=True)
    out.print(f"The service stays at {address} until Ctrl-C: OPENAI_BASE_URL={address}/v1", highlight=False)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
