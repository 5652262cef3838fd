"""python -m vlm_dft.rerun BUNDLE: train once more what a reproducibility bundle says, and compare every number.

A bundle is what the service's /v1/fine_tuning/jobs/{id}/bundle gives, unpacked or not:

    ├── config.json            RunConfig, with paths as they were
    ├── environment.json       packages, threads, devices, hash of the model it began with
    ├── requirements.txt       the same packages, for pip
    ├── metrics.jsonl          what it measured, one line per logged step
    ├── result.json            RunResult
    └── data/{train,validation}/   canonical datasets; their pictures where the bundle was asked to hold them

Exit codes: 0 every number and the model's hash are the same, 1 something differs or is missing, 2 wrong usage.
Bit for bit is promised on the same kind of device with the same packages; what differs of those is printed first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from vlm_dft.config import RunConfig, TrainConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.environment import Environment, installed_packages
from vlm_dft.errors import ConfigError, DatasetError, ModelError, VlmDftError
from vlm_dft.model_files import locate, model_sha256
from vlm_dft.results import RunResult
from vlm_dft.run_dir import RunDir, write_json

Model = TypeVar("Model", bound=BaseModel)

COMPARED: Final = ("objective_loss", "nll", "grad_norm", "learning_rate", "mean_weight", "num_tokens", "valid_nll")
"""Numbers of a step that depend on nothing but model, data and settings."""
_SHOWN_DIFFERENCES: Final = 10


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlm_dft.rerun", description="Train a bundle again and compare.")
    parser.add_argument("bundle", type=Path, help="directory, or .tar.gz, which is unpacked beside itself")
    parser.add_argument("--model", type=Path, help="directory of the base model, where it is not where it was")
    parser.add_argument("--images", type=Path, help="directory of the training pictures, if they are not in the bundle")
    parser.add_argument("--validation-images", type=Path, help="the same of the held-out pictures")
    options = parser.parse_args(arguments)
    try:
        bundle = _unpacked(options.bundle)
        roots = {"train": options.images, "validation": options.validation_images}
        differences = rerun(bundle, options.model, {name: root for name, root in roots.items() if root})
    except (VlmDftError, OSError) as error:
        print(f"rerun: {error}", file=sys.stderr)
        return 1
    for line in differences[:_SHOWN_DIFFERENCES]:
        print(line)
    if differences:
        print(f"{len(differences)} numbers differ")
        return 1
    print("every number is the same, and so is the model")
    return 0


def rerun(bundle: Path, model: Path | None, image_roots: dict[str, Path]) -> list[str]:
    """What differs, in words; empty: nothing. Raises VlmDftError for what is missing or is not what it was."""
    environment = _read(bundle / "environment.json", Environment)
    for line in environment_differences(environment):
        print(f"note: {line}")
    run = RunDir(bundle / "rerun")
    shutil.rmtree(run.path, ignore_errors=True)  # an earlier rerun's numbers are not this one's
    run.path.mkdir()
    train = _train_config(bundle, environment, model, image_roots)
    write_json(run.config_path, RunConfig(run_id=f"rerun-of-{_recorded(bundle).run_id}"[:64], train=train))
    threads = {"OMP_NUM_THREADS": str(environment.num_threads)} | environment.variables
    command = [sys.executable, "-m", "vlm_dft", str(run.path)]
    code = subprocess.run(command, env=os.environ | threads, check=False).returncode
    if code != 0:
        raise ConfigError(f"the training ended with exit code {code}: its output is above")
    return list(_differences(bundle, run))


def environment_differences(recorded: Environment) -> list[str]:
    """What is installed here otherwise than there."""
    here = installed_packages()
    names = [name for name, version in recorded.packages.items() if here.get(name) != version]
    return [f"{name} was {recorded.packages[name]} and is {here.get(name, 'not installed')}" for name in names]


def _recorded(bundle: Path) -> RunConfig:
    return _read(bundle / "config.json", RunConfig)


def _read(path: Path, model: type[Model]) -> Model:
    """Raises ConfigError naming the file and the field."""
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ConfigError(f"{path}: {where}: {first['msg']}: take the bundle anew") from None


def _train_config(
    bundle: Path, environment: Environment, model: Path | None, image_roots: dict[str, Path]
) -> TrainConfig:
    train = _recorded(bundle).train
    if train is None:
        raise ConfigError(f"{bundle / 'config.json'} trains nothing: only fine-tunings can be run again")
    source = str(model) if model else train.model
    found = model_sha256(locate(source, None if model else train.revision))
    if found != environment.model_sha256:
        raise ModelError(
            f"{source} is not the model it was: sha256 {found}, not {environment.model_sha256}; give --model"
        )
    if train.accuracy_probe is not None and train.accuracy_probe.patience is not None:
        raise ConfigError("the training could end early by a benchmark's accuracy, which is not in the bundle")
    caches = {name: bundle / "rerun" / "cache" for name in ("patch_cache", "vision_cache") if getattr(train, name)}
    return train.model_copy(
        update={
            "model": source,
            "revision": None if model else train.revision,
            "dataset": _dataset(bundle, "train", image_roots),
            "validation_dataset": _dataset(bundle, "validation", image_roots) if train.validation_dataset else None,
            "accuracy_probe": None,
            "resume_from": None,
            **{name: getattr(train, name).model_copy(update={"directory": path}) for name, path in caches.items()},
        }
    )


def _dataset(bundle: Path, name: str, image_roots: dict[str, Path]) -> Path:
    """The dataset with its pictures where they are. Raises DatasetError naming the first that is missing."""
    directory = bundle / "data" / name
    dataset = CanonicalDataset.open(directory)
    if name in image_roots:
        update = {"image_root": str(image_roots[name].resolve())}
        write_json(directory / "dataset.json", dataset.manifest.model_copy(update=update))
        dataset = CanonicalDataset.open(directory)
    for row in dataset:
        for part in row.images:
            if not dataset.image_path(part).is_file():
                option = "--images" if name == "train" else "--validation-images"
                remedy = f"give {option} DIRECTORY, or take the bundle with its pictures (?images=true)"
                raise DatasetError(f"{dataset.image_path(part)} is missing: {remedy}")
    return directory


def _differences(bundle: Path, run: RunDir) -> Iterator[str]:
    before, now = _steps(bundle / "metrics.jsonl"), _steps(run.metrics_path)
    for step in sorted(before.keys() | now.keys()):
        if step not in now or step not in before:
            yield f"step {step} was measured {'then' if step in before else 'now'} only"
            continue
        for name in COMPARED:
            if before[step].get(name) != now[step].get(name):
                yield f"step {step}: {name} was {before[step].get(name)!r} and is {now[step].get(name)!r}"
    then, result = (_read(path, RunResult) for path in (bundle / "result.json", run.result_path))
    first, second = (each.train.model_sha256 if each.train else None for each in (then, result))
    if first != second:
        yield f"the model was {first} and is {second}"


def _steps(path: Path) -> dict[int, dict[str, Any]]:
    """What is compared of each step. Training and held-out numbers share its record; a probe's are no training's."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        numbers = {name: record[name] for name in COMPARED if name in record}
        if numbers:
            found.setdefault(record["step"], {}).update(numbers)
    return found


def _unpacked(bundle: Path) -> Path:
    """The bundle as a directory. Raises ConfigError when there is none."""
    if bundle.is_file():
        target = bundle.with_name(bundle.name.removesuffix(".tar.gz") + "-unpacked")
        try:
            with tarfile.open(bundle) as archive:
                archive.extractall(target, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise ConfigError(f"{bundle} is no bundle, or not all of one: {error}") from None
        bundle = target
    if not (bundle / "config.json").is_file():
        raise ConfigError(f"{bundle} is no bundle: it holds no config.json")
    return bundle


if __name__ == "__main__":
    sys.exit(main())
