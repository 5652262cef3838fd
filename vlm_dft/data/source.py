"""Where a dataset's rows and pictures are: an uploaded file, an unpacked archive, a registered directory. Torch-free.

Pictures by path are relative to the data file's directory and stay below the root, whatever links are there.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlm_dft.config import ValidationConfig
from vlm_dft.data.archive import archive_kind, printable, unpack
from vlm_dft.data.draft import Picture
from vlm_dft.data.problems import FileError, RowError, shown

_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "package.json"})


@dataclass(frozen=True)
class Source:
    """An opened source."""

    data_file: Path
    name: str
    """The data file as reports name it."""
    root: Path | None
    """Pictures by path lie below it; None: a single file, which has none."""
    copies: bool
    """Whether pictures are copied into the dataset; else they stay below root."""

    def picture_path(self, picture: Picture) -> Path:
        """The regular file that a picture's path names. Raises RowError."""
        reference = picture.reference
        path = PurePosixPath(reference)
        if not reference or "\0" in reference or "\\" in reference:
            raise _refused(picture, "image_path_refused", "is empty or has a backslash or NUL in it: separate by /")
        if path.is_absolute() or ".." in path.parts or "://" in reference or reference.startswith(("~", "file:")):
            raise _refused(
                picture, "image_path_refused", "is absolute or leaves the dataset: use a path relative to it"
            )
        if self.root is None:
            reason = "is a path, but only the rows were uploaded: send an archive with the rows and their images"
            raise _refused(picture, "image_not_uploaded", reason)
        try:
            resolved = (self.data_file.parent / path).resolve(strict=True)
            mode = resolved.stat().st_mode
        except (OSError, RuntimeError, ValueError):  # absent, a loop of links, a name that no file can have
            raise _refused(picture, "image_missing", "does not exist in the dataset") from None
        if not resolved.is_relative_to(self.root):
            raise _refused(
                picture, "image_path_refused", "is a link that leaves the dataset: put the image itself there"
            )
        if not stat.S_ISREG(mode):
            raise _refused(picture, "image_not_a_file", "is no regular file")
        return resolved

    def relative(self, path: Path) -> str:
        """A resolved picture's path below root, as the canonical dataset names it."""
        assert self.root is not None
        return path.relative_to(self.root).as_posix()


def _refused(picture: Picture, code: str, reason: str) -> RowError:
    return RowError(picture.field, code, f"{shown(picture.reference, 120)} {reason}")


def open_source(config: ValidationConfig, unpacked: Path) -> Source:
    """Find the rows; an archive is unpacked into the directory `unpacked`. Raises FileError."""
    path = config.source
    if not path.exists():
        raise FileError(config.filename, "file_missing", "the file does not exist on the server: upload it again")
    if path.is_dir():
        return _from_directory(config, path.resolve(), copies=False)
    if archive_kind(path) is None:
        return Source(path, printable(config.filename), None, copies=True)
    unpacked.mkdir(parents=True)
    unpack(path, config.filename, unpacked, config.limits)
    return _from_directory(config, unpacked.resolve(), copies=True)


def _from_directory(config: ValidationConfig, root: Path, *, copies: bool) -> Source:
    data_file = _named(config, root) if config.data_file else _found(config, root)
    resolved = data_file.resolve()
    if not resolved.is_relative_to(root) or not resolved.is_file():
        reason = f"{shown(data_file.name)} is a link that leaves the dataset, or no regular file"
        raise FileError(config.filename, "data_file_refused", reason)
    return Source(data_file, printable(data_file.relative_to(root).as_posix()), root, copies)


def _named(config: ValidationConfig, root: Path) -> Path:
    path = PurePosixPath(config.data_file or "")
    if path.is_absolute() or ".." in path.parts or "\0" in str(path):
        reason = f"data_file {shown(config.data_file)} must be a path inside the dataset"
        raise FileError(config.filename, "data_file_refused", reason)
    if not (root / path).is_file():
        reason = f"data_file {shown(config.data_file)} does not exist; at the top are {shown(_names(root), 300)}"
        raise FileError(config.filename, "data_file_missing", reason)
    return root / path


def _names(directory: Path) -> list[str]:
    return sorted(printable(entry.name) for entry in directory.iterdir() if not entry.name.startswith("."))


def _found(config: ValidationConfig, root: Path) -> Path:
    directory = root
    entries = _visible(directory)
    while len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink():  # packed with its own directory
        directory = entries[0]
        entries = _visible(directory)
    files = [entry for entry in entries if entry.suffix.lower() in (".jsonl", ".json") and entry.name not in _METADATA]
    if len(files) > 1:
        files = [entry for entry in files if entry.name in ("data.jsonl", "data.json")] or files
    if not files:
        reason = f"no .jsonl or .json file at the top, only {shown(_names(directory), 300)}"
        raise FileError(config.filename, "no_data_file", reason)
    if len(files) > 1:
        names = [printable(entry.name) for entry in files]
        reason = f"{shown(names, 300)} may all hold the rows: name one as data_file, or call it data.jsonl"
        raise FileError(config.filename, "several_data_files", reason)
    return files[0]


def _visible(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
