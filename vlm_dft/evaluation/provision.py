"""Which benchmarks a directory holds, what each is, and how one is added to it. Torch-free.

    BENCHMARKS/
    ├── MathVerse_MINI.tsv            a file that VLMEvalKit publishes, by its own name
    ├── mathvision/test.jsonl ...     a directory as the authors publish it; what it is follows from its name
    └── mine/benchmark.json, ...      added by ``add``: a Manifest says what it is

``add`` copies, checks sums, reads every row and every picture's header, and renames into place: what is listed can be
scored. A URL is taken over https alone, and with a checksum alone. Knows nothing about the service.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args
from urllib.parse import urlsplit

from pydantic import ValidationError

from vlm_dft.config import BenchmarkConfig, BenchmarkKind, Frozen, Scoring
from vlm_dft.errors import BenchmarkError, VlmDftError
from vlm_dft.evaluation.benchmarks import RULES, load_benchmark
from vlm_dft.evaluation.sources import SUFFIXES, find_source
from vlm_dft.run_dir import directory_in_place, disk_errors, write_json

MANIFEST_NAME = "benchmark.json"
MAX_DOWNLOAD_BYTES = 32 * 2**30
_NAME = re.compile(BenchmarkConfig.model_fields["name"].metadata[-1].pattern)

_HOST = "https://opencompass.openxlab.space/utils"
PUBLISHED: Final[dict[str, tuple[str, str]]] = {
    "MathVerse_MINI": ("benchmarks/MathVerse/MathVerse_MINIV.tsv", "5017caca32b7fa110c350a1bea861b65"),
    "MathVerse_MINI_Vision_Only": ("benchmarks/MathVerse/MathVerse_MINIVOnly.tsv", "68a11d4680014ac881fa37adeadea3a4"),
    "MathVerse_MINI_Vision_Dominant": (
        "benchmarks/MathVerse/MathVerse_MINIVDom.tsv",
        "b8fb63852d261ab2aaefba29cc2414d3",
    ),
    "MathVerse_MINI_Vision_Intensive": (
        "benchmarks/MathVerse/MathVerse_MINIVInt.tsv",
        "01cbd35be202bb0c4873a4186a63bc19",
    ),
    "MathVerse_MINI_Text_Lite": ("benchmarks/MathVerse/MathVerse_MINITLite.tsv", "19e4b13bdd30b89a03b2e358bcfefa04"),
    "MathVerse_MINI_Text_Dominant": ("benchmarks/MathVerse/MathVerse_MINITDom.tsv", "4f5cd2fa6630ea00bb11d6fde1f6fe6a"),
    "MathVision": ("VLMEval/MathVision.tsv", "93f6de14f7916e598aa1b7165589831e"),
    "MathVision_MINI": ("VLMEval/MathVision_MINI.tsv", "060fe4fa5d868987ce179307bd5f8a33"),
    "WeMath": ("VLMEval/WeMath.tsv", "b5e969a075f01290a542411fb7766388"),
}
"""VLMEvalKit's TSV files: where they are published, and their md5."""

_KINDS: Final[dict[str, BenchmarkKind]] = {
    "mathverse": "mathverse",
    "mathvision": "mathvision",
    "wemath": "wemath",
    **dict.fromkeys(("math500", "gsm8k", "minerva", "olympiadbench", "aime", "amc"), "text_math"),
}


class Manifest(Frozen):
    """benchmark.json of an added benchmark, written last: its existence means that the copy is complete."""

    kind: BenchmarkKind
    file: str
    """Relative to the directory."""
    scoring: Scoring | None = None
    items: int
    pictures: int
    """Items with one."""
    sha256: str
    """Of the file."""
    published: bool | None
    """Whether VLMEvalKit publishes just this file; None: it publishes none of this name."""
    source: str
    """Where it came from, as it was given."""


@dataclass(frozen=True)
class Found:
    """A benchmark that is there."""

    kind: BenchmarkKind
    path: Path
    manifest: Manifest | None = None

    @property
    def has_pictures(self) -> bool | None:
        """None: not known before it is read."""
        return None if self.manifest is None else self.manifest.pictures > 0

    def config(self, name: str, limit: int | None = None) -> BenchmarkConfig:
        scoring = self.manifest.scoring if self.manifest else None
        return BenchmarkConfig(name=name, kind=self.kind, path=self.path, limit=limit, scoring=scoring)


def kind_of(name: str) -> BenchmarkKind | None:
    """The kind whose name, or whose benchmark's name, the name contains, however it is written."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((kind for part, kind in _KINDS.items() if part in plain), None)


def find_benchmarks(directory: Path) -> dict[str, Found]:
    """Name -> benchmark, by name; entries with neither a manifest nor a telling name are none of ours."""
    found: dict[str, Found] = {}
    if not directory.is_dir():
        return found
    for path in sorted(directory.iterdir()):
        name = path.name if path.is_dir() else path.stem
        if not _NAME.fullmatch(name):
            continue
        if (path / MANIFEST_NAME).is_file():
            manifest = read_manifest(path)
            found[name] = Found(manifest.kind, (path / manifest.file).resolve(), manifest)
        elif name in found and found[name].manifest:
            continue  # what was added stands before the file that it was added from
        elif (kind := kind_of(name)) and (path.is_dir() or path.suffix.lower() in SUFFIXES):
            found[name] = Found(kind, path.resolve())
    return found


def unknown_benchmarks(directory: Path) -> list[Path]:
    """Files and directories that may be benchmarks, and of which nothing says what they are: ``add`` makes them one."""
    if not directory.is_dir():
        return []
    known = find_benchmarks(directory)
    return [
        path
        for path in sorted(directory.iterdir())
        if not {path.name, path.stem} & known.keys() and not path.name.startswith(".") and _may_be_benchmark(path)
    ]


def _may_be_benchmark(path: Path) -> bool:
    if path.is_dir():
        return any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    return path.suffix.lower() in SUFFIXES


def how_to_add(path: Path) -> str:
    """What makes a benchmark of something that lies in the directory already."""
    return f"vlm-dft benchmarks add {path} --replace --kind {'|'.join(get_args(BenchmarkKind))}"


def read_manifest(directory: Path) -> Manifest:
    """Raises BenchmarkError."""
    path = directory / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise BenchmarkError(f"{path}: not a benchmark's manifest ({reason}): add the benchmark again") from None
    if not (directory / manifest.file).resolve().is_relative_to(directory.resolve()):
        raise BenchmarkError(f"{path}: the file {manifest.file!r} is outside of its directory")
    return manifest


def where_it_goes(name: str, directory: Path) -> str:
    """What to do about a benchmark that is not there."""
    lying = next((path for path in unknown_benchmarks(directory) if name.lower() in _names_of(path)), None)
    if lying is not None:
        return f"{lying} is there, but nothing says what it is: run `{how_to_add(lying)}`"
    kind = kind_of(name)
    if kind is None:
        return f"add your own with `vlm-dft benchmarks add PATH --name {name}` (it goes into {directory})"
    official = [
        f"{each}.tsv (md5 {md5}, published at {_HOST}/{tail})"
        for each, (tail, md5) in PUBLISHED.items()
        if kind_of(each) == kind and each.count("_") < 2
    ]
    files = (
        " or ".join(official) or f"a file such as {', '.join(RULES[kind].NAMES)} of its authors, in a directory {name}"
    )
    return f"put {files} into {directory}, or run `vlm-dft benchmarks add PATH`"


def _names_of(path: Path) -> tuple[str, str]:
    return path.name.lower(), path.stem.lower()


def add(
    source: str,
    directory: Path,
    *,
    name: str | None = None,
    kind: BenchmarkKind | None = None,
    scoring: Scoring | None = None,
    checksum: str | None = None,
    modified: bool = False,
    replace: bool = False,
) -> tuple[str, Manifest]:
    """Copy the benchmark at source (a file, a directory or an https URL) into directory; returns its name.

    checksum: md5 or sha256 of the file; needed for a URL unless VLMEvalKit publishes its md5. modified: take a file
    under a published name whose md5 is another. Raises BenchmarkError, DiskFullError.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        if "://" in source:
            path, checksum = _downloaded(source, Path(temporary), checksum)
        else:
            path = Path(source).expanduser()
            if not path.exists():
                raise BenchmarkError(f"{path} does not exist: give a benchmark's file or directory, or an https URL")
        chosen = name or _usual_name(path)
        if not _NAME.fullmatch(chosen):
            raise BenchmarkError(f"{chosen!r} cannot be a benchmark's name: give --name of letters, digits and _.:-")
        target = directory / chosen
        if (target.exists() or (directory / f"{chosen}.tsv").exists()) and not replace:
            raise BenchmarkError(f"{chosen} is already in {directory}: choose another name, or replace it")
        found_kind = kind or kind_of(chosen) or "custom"
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with directory_in_place(target) as staged:
            _copy(path, staged)
            file = find_source(found_kind, staged, RULES[found_kind].NAMES)
            digests = _digests(file)
            published = _check_sums(path, chosen, digests, checksum, modified=modified)
            config = BenchmarkConfig(name=chosen, kind=found_kind, path=file, scoring=scoring)
            benchmark = _read(config, staged, path)
            manifest = Manifest(
                kind=found_kind,
                file=str(file.relative_to(staged)),
                scoring=scoring,
                items=len(benchmark.items),
                pictures=sum(item.picture is not None for item in benchmark.items),
                sha256=digests["sha256"],
                published=published,
                source=source,
            )
            write_json(staged / MANIFEST_NAME, manifest)
    return chosen, manifest


def _usual_name(path: Path) -> str:
    """The file's or directory's own name; VLMEvalKit's name for a file that is published under another one."""
    stem = path.name if path.is_dir() else path.stem
    return next((name for name, (tail, _) in PUBLISHED.items() if Path(tail).stem == stem), stem)


def _copy(path: Path, staged: Path) -> None:
    with disk_errors(staged):
        if path.is_dir():
            shutil.copytree(path, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST_NAME, ".git"))
        elif path.suffix.lower() in SUFFIXES:
            shutil.copyfile(path, staged / path.name)
        else:
            raise BenchmarkError(f"{path}: a benchmark file ends in {', '.join(SUFFIXES)}")


def _read(config: BenchmarkConfig, staged: Path, path: Path) -> Any:
    """All items; complaints name the place that was given, not our copy."""
    try:
        return load_benchmark(config, "direct")
    except BenchmarkError as error:
        where = path if path.is_dir() else path.parent
        hint = (
            None
            if path.is_dir()
            else f"pictures that are files are copied only with their directory: add {path.parent}"
        )
        message = error.message.replace(str(staged.resolve()), str(where)).replace(str(staged), str(where))
        raise BenchmarkError(message, hint=hint) from None


def _digests(file: Path) -> dict[str, str]:
    found = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with file.open("rb") as content:
        while block := content.read(2**20):
            for digest in found.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in found.items()}


def _check_sums(path: Path, name: str, digests: dict[str, str], checksum: str | None, *, modified: bool) -> bool | None:
    """Whether VLMEvalKit publishes just this file; None: it publishes none of this name. Raises BenchmarkError."""
    if checksum is not None and checksum.lower() not in digests.values():
        found = digests["md5" if len(checksum) == 32 else "sha256"]
        raise BenchmarkError(f"{path}: the checksum is {found}, not {checksum}: fetch the file again")
    if path.suffix.lower() != ".tsv" or name not in PUBLISHED:
        return None
    tail, md5 = PUBLISHED[name]
    if digests["md5"] == md5:
        return True
    if not modified:
        raise BenchmarkError(
            f"{path}: the md5 is {digests['md5']}, but VLMEvalKit publishes {name}.tsv with {md5} ({_HOST}/{tail}): "
            "fetch it again, or take this one under a name of its own or as modified"
        )
    return False


def check_published(config: BenchmarkConfig) -> None:
    """Raises BenchmarkError for a file that was put there by hand under a published name and is another one."""
    try:
        path = find_source(config.kind, config.path, RULES[config.kind].NAMES)
    except BenchmarkError:
        return  # told when it is to be read, after what is wrong with the settings
    if path.suffix.lower() != ".tsv" or path.stem not in PUBLISHED or (path.parent / MANIFEST_NAME).is_file():
        return
    try:
        _check_sums(path, path.stem, _digests(path), None, modified=False)
    except BenchmarkError as error:
        hint = f"to score it as it is: vlm-dft benchmarks add {path} --modified --replace"
        raise BenchmarkError(error.message, hint=hint) from None


def _downloaded(url: str, directory: Path, checksum: str | None) -> tuple[Path, str]:
    """The file behind an https URL, and the checksum that it must have. Raises BenchmarkError."""
    import httpx

    parts = urlsplit(url)
    name = Path(parts.path).name
    if parts.scheme != "https" or parts.username or not parts.hostname:
        raise BenchmarkError(f"{url}: only https URLs without credentials are fetched")
    if Path(name).suffix.lower() not in SUFFIXES:
        raise BenchmarkError(f"{url}: a benchmark file ends in {', '.join(SUFFIXES)}")
    checksum = checksum or next((md5 for tail, md5 in PUBLISHED.values() if tail.endswith(f"/{name}")), None)
    if checksum is None:
        raise BenchmarkError(f"{url}: give the file's md5 or sha256 as the checksum: nothing else is taken for it")
    path = directory / name
    try:
        with httpx.stream("GET", url, follow_redirects=False, timeout=60) as answer, path.open("wb") as file:
            if answer.is_redirect:
                raise BenchmarkError(
                    f"{url} redirects to {answer.headers.get('location')}: give that URL if you trust it"
                )
            answer.raise_for_status()
            size = 0
            with disk_errors(path):
                for block in answer.iter_bytes(2**20):
                    size += len(block)
                    if size > MAX_DOWNLOAD_BYTES:
                        raise BenchmarkError(f"{url}: larger than {MAX_DOWNLOAD_BYTES} bytes")
                    file.write(block)
    except VlmDftError:
        raise
    except (httpx.HTTPError, OSError) as error:
        raise BenchmarkError(
            f"{url} cannot be fetched ({str(error) or type(error).__name__}): fetch it elsewhere and add it by its path"
        ) from None
    return path, checksum
