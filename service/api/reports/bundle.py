"""The reproducibility bundle: a finished job as one archive that ``python -m vlm_dft.rerun`` trains again.

Its layout is ``vlm_dft.rerun``'s. Reads rows and run directories; writes the archive and nothing else.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from service import storage
from service.api.jobs import without_attempt_paths
from service.api.runs import merged_metrics
from service.errors import InvalidStateError
from service.jobs.phases import Phase
from service.jobs.tables import Attempt, Job
from vlm_dft.data.canonical import MANIFEST_NAME, ROWS_NAME, CanonicalDataset
from vlm_dft.errors import DatasetError
from vlm_dft.run_dir import RunDir

README = """# {name}

Everything that decided this training. To get the same numbers again, on the same kind of device:

    pip install -r requirements.txt        # the packages it ran with; vlm-dft from its own repository,
                                           # versions with a + from their makers' own indexes
    python -m vlm_dft.rerun . --model DIR{images}

It trains once more, then compares every logged number and the exported model's hash.
config.json: the resolved configuration, seeds included, with paths as the service had them.
environment.json: packages, threads, devices, the model's hash.
data/: the rows as they were read, with the hash of each picture. metrics.jsonl, result.json: what came out.
"""


def write_bundle(file: IO[bytes], job: Job, attempts: Sequence[Attempt], *, images: bool) -> None:
    """images: put the pictures into it, too. Raises InvalidStateError when the job or its data cannot be rerun."""
    if job.phase != Phase.SUCCEEDED or not attempts:
        raise InvalidStateError(f"{job.id} is {job.phase}: only a job that has succeeded has a bundle")
    run = RunDir(Path(attempts[-1].run_path))
    if not run.environment_path.is_file():
        raise InvalidStateError(f"{job.id} recorded no environment: it ran with an older version; train it again")
    train = job.config["train"]
    environment = run.environment_path.read_bytes()
    packages = json.loads(environment)["packages"]
    pins = "".join(f"{name}=={version}\n" for name, version in packages.items() if name != "vlm-dft")
    hint = "" if images else f" --images DIR{' --validation-images DIR' if train['validation_dataset'] else ''}"
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
        _add(archive, "README.md", README.format(name=job.fine_tuned_model or job.id, images=hint))
        _add(archive, "request.json", job.request)
        _add(archive, "config.json", without_attempt_paths(job.config))
        _add(archive, "environment.json", environment)
        _add(archive, "requirements.txt", pins)
        _add(archive, "result.json", job.result)
        metrics = merged_metrics(attempts, 0, None)
        _add(archive, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
        for name, dataset in (("train", train["dataset"]), ("validation", train["validation_dataset"])):
            if dataset is not None:
                _add_dataset(archive, f"data/{name}", Path(dataset), images=images)


def _add_dataset(archive: tarfile.TarFile, name: str, directory: Path, *, images: bool) -> None:
    storage.look(directory)
    try:
        dataset = CanonicalDataset.open(directory)
        if images and dataset.image_root == directory:
            storage.fetch(directory)
        manifest = dataset.manifest.model_copy(update={"image_root": "."} if images else {})
        _add(archive, f"{name}/{MANIFEST_NAME}", manifest.model_dump(mode="json"))
        _add_file(archive, f"{name}/{ROWS_NAME}", directory / ROWS_NAME)
        for image in dict.fromkeys(part.image for row in dataset for part in row.images) if images else ():
            _add_file(archive, f"{name}/{image}", dataset.image_root / image)
    except (DatasetError, FileNotFoundError) as error:
        message = (
            f"the job's data is gone ({error}): a bundle must be taken before the file or its pictures are deleted"
        )
        raise InvalidStateError(message) from None


def _add_file(archive: tarfile.TarFile, name: str, path: Path) -> None:
    """What it holds, were it a link, and not whose it is here."""
    with path.open("rb") as file:
        member = tarfile.TarInfo(name)
        member.size = os.fstat(file.fileno()).st_size
        archive.addfile(member, file)


def _add(archive: tarfile.TarFile, name: str, content: bytes | str | dict[str, Any] | None) -> None:
    if isinstance(content, str):
        content = content.encode()
    elif not isinstance(content, bytes):
        content = json.dumps(content, indent=2).encode() + b"\n"
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
