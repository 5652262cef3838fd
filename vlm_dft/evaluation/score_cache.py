"""Scores that runs share: the SFT and the DFT arm of an experiment score their base model once. Torch-free.

One file per identity (model, benchmark, settings, scorer, judge), written by rename: a line with identity and score,
then one line per prediction. An entry counts only when its identity is equal, and when nothing of it is missing. Two
runs that miss at the same time both compute, and the later one stays.

What was not used for longest makes room (``make_room``), verdicts of judges and pictures beside the scores included. No
score needs any of it once it is written: its run has copies of the predictions, and links to the pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from pydantic import ValidationError

from vlm_dft.evaluation.predictions import Prediction
from vlm_dft.results import Score
from vlm_dft.run_dir import disk_errors, write_atomically

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What an earlier run found."""

    score: Score
    predictions: list[Prediction]


@dataclass(frozen=True)
class ScoreCache:
    """A directory of entries."""

    directory: Path

    def path(self, identity: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.directory / f"{digest}.jsonl"

    def find(self, identity: dict[str, Any]) -> Entry | None:
        """The entry of this identity; None when there is none, or a damaged one, which is then logged."""
        path = self.path(identity)
        try:
            first, *lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        except ValueError:
            log.warning("%s is empty: scoring anew", path)
            return None
        try:
            header = json.loads(first)
            score = Score.model_validate(header["score"])
            predictions = [Prediction.model_validate_json(line) for line in lines]
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            log.warning("%s is damaged (%s): scoring anew", path, error)
            return None
        with suppress(FileNotFoundError):  # another run made room meanwhile
            os.utime(path)  # used: the last to make room
        if header["identity"] != identity or len(predictions) != header["num_predictions"]:
            log.warning("%s is of another identity or incomplete: scoring anew", path)
            return None
        return Entry(score, predictions)

    def put(self, identity: dict[str, Any], score: Score, predictions: Sequence[Prediction]) -> None:
        """Raises DiskFullError."""
        header = {"identity": identity, "score": score.model_dump(mode="json"), "num_predictions": len(predictions)}
        lines = [json.dumps(header), *(prediction.model_dump_json() for prediction in predictions)]
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(identity), ("\n".join(lines) + "\n").encode())

    def make_room(self, max_gib: float) -> list[Path]:
        """Delete what was not used for longest until the rest fits; the deleted. What a run links stays."""
        found: list[tuple[float, int, Path]] = []
        for path in self.directory.rglob("*"):
            with suppress(FileNotFoundError):  # another run was first
                stat = path.lstat()
                if S_ISREG(stat.st_mode) and stat.st_nlink == 1 and not path.name.startswith("."):
                    found.append((stat.st_mtime, stat.st_size, path))
        held, deleted = sum(size for _, size, _ in found), []
        for _, size, path in sorted(found):
            if held <= max_gib * 2**30:
                break
            path.unlink(missing_ok=True)
            held -= size
            deleted.append(path)
        if deleted:
            log.info("%s: %d of %d entries made room", self.directory, len(deleted), len(found))
        return deleted
