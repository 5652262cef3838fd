"""What a service may hold when somebody looks at its dashboard: many jobs, a long one, a comparison, items.

Made through the API and the store, with the run directories that workers would have left.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from api_server import Api
from datasets_for_tests import picture_row
from PIL import Image, ImageDraw
from store_samples import new_job
from test_api_evaluations import score

from service.jobs import store
from service.jobs.phases import Queue
from vlm_dft.data.canonical import Row, TextPart
from vlm_dft.evaluation.item_files import PICTURES_NAME, ItemRecord, PictureRecord
from vlm_dft.results import SampleAnswer, StepMetrics
from vlm_dft.run_dir import RunDir

BENCHMARK = "MathVerse_MINI"
COLOURS = ("red", "blue", "lime", "white")


def step_metrics(step: int, total: int) -> StepMetrics:
    """Numbers that look like a training's."""
    nll = 0.4 + 5 * math.exp(-6 * step / total) + 0.05 * math.sin(step * 1.7)
    weight = math.exp(-nll)
    return StepMetrics(
        step=step,
        epoch=step / total,
        objective_loss=weight * nll,
        nll=nll,
        mean_weight=weight,
        effective_sample_size=0.6 + weight / 3,
        share_p_below_01=0.4 * math.exp(-3 * step / total),
        share_p_above_09=weight,
        eos_nll=nll / 4,
        entropy=nll * 0.8,
        token_accuracy=1 - math.exp(-2 * step / total),
        num_tokens=400 + step % 7,
        input_tokens=4000,
        num_samples=16,
        grad_norm=1 + nll / 3,
        learning_rate=5e-5 * (1 - step / total),
        tokens_per_second=4200 + 100 * math.sin(step),
        samples_per_second=17.0,
        peak_memory_gib=11.5,
        time=time.time(),
    )


def write_metrics(run: RunDir, steps: int) -> None:
    run.metrics_path.parent.mkdir(parents=True, exist_ok=True)
    run.metrics_path.write_text("".join(step_metrics(n, steps).model_dump_json() + "\n" for n in range(1, steps + 1)))


def write_histograms(run: RunDir, steps: int) -> None:
    for step in (0, steps // 2, steps):
        counts = [int(200 * math.exp(-b * (1 + step / steps)) + 300 * step / steps * (b == 19)) for b in range(20)]
        line = {"step": step, "split": "train", "part": "answer", "counts": counts, "num_tokens": sum(counts)}
        with run.histograms_path.open("a") as file:
            file.write(json.dumps(line | {"num_rows": 32, "time": 0.0}) + "\n")


def write_samples(run: RunDir, rows: Sequence[Row], answers: dict[int, str]) -> None:
    """The rows' answers by step; one that ends in ... was cut."""
    for step, answer in answers.items():
        for row in rows:
            *prompt, target = row.messages
            sample = SampleAnswer(
                step=step,
                split="train",
                row_id=row.id,
                prompt=tuple(prompt),
                reference="".join(part.text for part in target.content if isinstance(part, TextPart)),
                answer=answer,
                num_tokens=len(answer.split()) + 1,
                finish_reason="length" if answer.endswith("...") else "stop",
                time=0.0,
            )
            run.append_sample(sample)


def write_items(run: RunDir, verdicts: dict[str, list[bool]]) -> tuple[Any, ...]:
    """Predictions of both roles, the items and their pictures; returns the scores."""
    scores = []
    for role, each in verdicts.items():
        directory = run.evaluation_path(role, BENCHMARK)
        directory.mkdir(parents=True)
        lines = [prediction(number, right) for number, right in enumerate(each)]
        (directory / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        right, n = sum(each), len(each)
        update = {"model_role": role, "value": right / n, "numerator": right, "denominator": n, "n": n, "n_total": n}
        scores.append(score(BENCHMARK).model_copy(update=update))
        (directory / "score.json").write_text(scores[-1].model_dump_json())
    items = run.items_path(BENCHMARK)
    (items / PICTURES_NAME).mkdir(parents=True)
    records = [item(items, number) for number in range(len(verdicts["tuned"]))]
    (items / "items.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in records))
    return tuple(scores)


def prediction(number: int, right: bool) -> dict[str, Any]:
    said = "ABCD"[number % 4 if right else (number + 1) % 4]
    line = {"id": str(number), "prompt": "Which colour?", "prediction": f"<answer>{said}</answer>", "extracted": said}
    line |= {"rule": "tag", "answer": "ABCD"[number % 4], "correct": right}
    return line | {"finish_reason": "stop", "num_generated_tokens": 6}


def item(items: Path, number: int) -> ItemRecord:
    picture = Image.new("RGB", (140, 84), COLOURS[number % 4])
    ImageDraw.Draw(picture).ellipse((30, 12, 110, 72), outline="black", width=3)
    content = io.BytesIO()
    picture.save(content, "PNG")
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    (items / PICTURES_NAME / sha256).write_bytes(content.getvalue())
    return ItemRecord(
        id=str(number),
        group=str(number),
        question="Which colour?",
        options=dict(zip("ABCD", COLOURS, strict=True)),
        categories={"subject": "colour"},
        answer="ABCD"[number % 4],
        picture=PictureRecord(sha256=sha256, media_type="image/png", width=140, height=84),
    )


def comparison(api: Api, http: httpx.Client, file_id: str) -> dict[str, Any]:
    """SFT against DFT, both ended."""
    body = {
        "name": "SFT or DFT",
        "job": {
            "model": "tiny",
            "training_file": file_id,
            "evaluation": {"benchmarks": [BENCHMARK], "include_base": True},
        },
        "arms": [{"name": "sft", "objective": "nll"}, {"name": "dft", "objective": "dft"}],
    }
    made = http.post("/v1/fine_tuning/comparisons", json=body).raise_for_status().json()
    for arm, right in zip(made["arms"], (6, 9), strict=True):
        claim = api.claim(arm["job_id"])
        run = RunDir(claim.run_path)
        write_metrics(run, 60)
        write_histograms(run, 60)
        rows = [picture_row(number, Path(claim.config["train"]["dataset"])) for number in range(2)]
        write_samples(run, rows, {0: "A shape, a shape, a ...", 30: "I see a shape.", 60: "<answer>red</answer>"})
        verdicts = {"tuned": [n < right for n in range(12)], "base": [n % 3 == 0 for n in range(12)]}
        api.finish(claim, scores=write_items(run, verdicts))
    return made


def gpu_worker(api: Api) -> None:
    """The worker that took the jobs above, with two GPUs; of one of them the driver does not tell everything."""
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_total_gib": 79.6, "memory_used_gib": 61.2}
    devices = [
        gpu | {"index": 0, "uuid": "GPU-0", "utilisation_percent": 97, "temperature_celsius": 64},
        gpu | {"index": 1, "uuid": "GPU-1", "utilisation_percent": None, "temperature_celsius": None},
    ]
    with api.database.write() as s:
        store.register_worker(
            s, "test:worker:1", host="gpu-box", queue=Queue.GPU, pid=1, devices=devices, versions={"python": "3.11"}
        )


def many_jobs(api: Api, file_id: str, count: int) -> None:
    with api.database.write() as s:
        for number in range(count):
            store.submit(s, new_job(training_file=file_id, request={"model": "tiny", "suffix": f"job-{number}"}))


def long_job(api: Api, http: httpx.Client, file_id: str, steps: int) -> str:
    """A running job with that many steps behind it."""
    body = {"model": "tiny", "training_file": file_id, "suffix": "long", "method": {"type": "dft"}, "priority": "high"}
    job_id = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    claim = api.claim(job_id)
    write_metrics(RunDir(claim.run_path), steps)
    return job_id
