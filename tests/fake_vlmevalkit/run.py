"""Acts as VLMEvalKit's run.py does, failures included, for our scores' tests. Written from how it behaves.

plan.json beside it: {"infer": [...], "eval": [...]}, one word per start, the last one for all later starts:
ok, error (exit 0), crash (exit 1), sigterm, hang, half (killed half way), or a fault in what is written.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PREDICTION_FILE = "{model}_{data}.tsv"


class Dataset:
    """A data set class of VLMEvalKit's, as far as a model sees it."""

    def __init__(self, dataset: str, kind: str) -> None:
        self.dataset_name, self.kind = dataset, kind
        root = os.environ["LMUData"]  # noqa: SIM112  (VLMEvalKit's spelling)
        path = Path(root) / f"{dataset}.tsv"
        csv.field_size_limit(sys.maxsize)
        with path.open(newline="") as file:
            self.rows = list(csv.DictReader(file, dialect="excel-tab"))
        self.data = Rows(self.rows)

    def build_prompt(self, line: dict[str, str]) -> list[dict[str, str]]:
        text = line["question"]
        if self.kind == "WeMath":
            options = "".join(f"{letter}. {line[letter]}\n" for letter in "ABCDEFGH" if line.get(letter))
            hint = f"Hint: {line['hint']}\n" if line["hint"] else ""
            text = f"{hint}Question: {text}\nOptions:\n{options}"
        return [{"type": "image", "value": line["image_path"]}, {"type": "text", "value": text}]

    def dump_image(self, line: dict[str, str]) -> None: ...


class Rows:
    """A DataFrame, as far as a model sees it."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.iloc = rows

    def __len__(self) -> int:
        return len(self.iloc)


def plan(mode: str) -> str:
    """What to do at this start."""
    counter = ROOT / f"{mode}.starts"
    starts = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(starts + 1))
    words = json.loads((ROOT / "plan.json").read_text()).get(mode, ["ok"])
    return words[min(starts, len(words) - 1)]


def fail(word: str) -> None:
    """End, or never end, as a process does."""
    if word == "crash":
        sys.exit(1)
    if word == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    if word == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (ROOT / "own.pid").write_text(str(os.getpid()))
        (ROOT / "child.pid").write_text(str(child.pid))
        time.sleep(600)


def infer(config: dict[str, Any], run: Path, model: str, name: str, word: str) -> dict[str, Any]:
    settings = dict(config["model"][model])
    answerer = getattr(importlib.import_module("vlmeval.vlm"), settings.pop("class"))(**settings)
    dataset = Dataset(name, config["data"][name]["class"])
    answerer.set_dump_image(dataset.dump_image)
    rows = []
    for number, row in enumerate(dataset.rows):
        if word == "half" and number == len(dataset.rows) // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = answerer.generate(message=dataset.build_prompt(row), dataset=name)
        rows.append({**row, "prediction": "Failed to obtain answer via API." if word == "marker" else answer})
    random.shuffle(rows)
    if word == "short":
        rows.pop()
    write(run / PREDICTION_FILE.format(model=model, data=name), rows, "\t")
    return {"status": "done", "skip_reason": "mode_infer"}


def score(config: dict[str, Any], run: Path, model: str, name: str, word: str, judge: str) -> dict[str, Any]:
    """WeMath's alone: exact matching, or every answer looked up by a judge that is always right."""
    source = sorted(run.parent.glob("T*/" + PREDICTION_FILE.format(model=model, data=name)))[-1]
    target = run / source.name
    if source != target:
        target.write_bytes(source.read_bytes())
    wemath = importlib.import_module("vlmeval.dataset.utils.wemath")
    table = wemath.evaluate(str(target))
    if word == "wrong-table":
        table["Score (Strict)"] = "12.34%"
    if word == "nan":
        table["CompleteMastery (Strict)"] = "nan%"
    if word != "no-table":
        write(run / f"{model}_{name}_{judge}_score.csv", [table], ",")
    return {"status": "done", "skip_reason": "No infer result found"} if word == "skip" else {"status": "done"}


def write(path: Path, rows: list[dict[str, str]], delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--config", "--work-dir", "--mode", "--judge", "--reuse-aux", "--judge-base-url", "--judge-retry"):
        parser.add_argument(name)
    for name in ("--judge-timeout", "--api-nproc"):
        parser.add_argument(name)
    for name in ("--reuse", "--keep-failed"):
        parser.add_argument(name, action="store_true")
    arguments = parser.parse_args()
    word = plan(arguments.mode)
    (ROOT / f"{arguments.mode}.environment.json").write_text(json.dumps(dict(os.environ)))
    with (ROOT / "arguments.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    fail(word)
    config = json.loads(Path(arguments.config).read_text())
    (model,) = config["model"]
    run = Path(arguments.work_dir) / model / f"T20260101-{time.monotonic_ns():020d}"
    run.mkdir(parents=True)
    datasets: dict[str, Any] = {}
    for name in config["data"]:
        try:
            if word == "error":
                raise ZeroDivisionError("float division by zero")
            if arguments.mode == "infer":
                datasets[name] = infer(config, run, model, name, word)
            else:
                datasets[name] = score(config, run, model, name, word, arguments.judge)
        except Exception as error:  # noqa: BLE001  (as VLMEvalKit does)
            datasets[name] = {"status": "done", "error_message": str(error)}
    (run / "status.json").write_text(json.dumps({"datasets": datasets}))


if __name__ == "__main__":
    main()
