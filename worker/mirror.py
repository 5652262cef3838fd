"""Keeps an object store up with one attempt's run directory, and the run directory with the store before it starts.

A checkpoint counts as written only when it is whole in the store: until then no row names it. Knows nothing of leases;
whoever calls ``fetch_inputs`` and ``finish``, which take as long as the bytes need, renews them meanwhile.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from pathlib import Path

import structlog

from service.jobs import store
from service.jobs.references import paths_in
from service.settings import Settings
from service.storage import Storage, StorageError, forget_local, open_storage
from vlm_dft.run_dir import Checkpoint, RunDir

log = structlog.get_logger(__name__)
LOOK_SECONDS = 0.5
_WHOLE = ("export", "dataset")


class Mirror:
    """Of one attempt, where there is an object store."""

    def __init__(self, storage: Storage, settings: Settings, claim: store.Claim) -> None:
        self._storage = storage
        self._settings = settings
        self._claim = claim
        self._run = RunDir(claim.run_path)
        self._stored: set[Path] = set()
        """Checkpoint directories that are whole in the store."""
        self._texts: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def fetch_inputs(self) -> None:
        """Have on disk what the job reads, and what earlier attempts left. Raises StorageError."""
        fetched = (self._settings.files_dir, self._settings.runs_dir)
        for path in sorted(set(paths_in(self._claim.config))):
            if any(path.is_relative_to(directory) for directory in fetched):
                self._storage.fetch(path)
        steps: list[Path] = []
        for run in self._claim.previous_run_paths:
            self._storage.fetch_texts(run)
            steps += self._storage.steps(run)
        if steps:
            self._storage.fetch(max(steps, key=lambda path: path.name))

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Look for nothing new; what is under way goes on."""
        self._stop.set()

    def is_stored(self, checkpoint: Checkpoint) -> bool:
        """Whether another host could go on from it."""
        return checkpoint.path in self._stored

    def settle(self, steps: Collection[int]) -> None:
        """No row names checkpoints of other steps any more: they may go from the store."""
        kept = {self._run.checkpoint_path(step) for step in steps}
        for path in sorted(self._stored - kept):
            if not path.exists():
                self._stored.discard(path)
                self._try(lambda path=path: self._storage.remove(path), f"{path.name} is left in the store")

    def finish(self) -> None:
        """Store all that the attempt leaves behind, after what is under way. Raises StorageError."""
        self._thread.join()
        for checkpoint in self._run.complete_checkpoints():
            self._put(checkpoint)
        for name in _WHOLE:
            if (self._run.path / name).is_dir():
                self._storage.put(self._run.path / name)
        self._storage.put_texts(self._run.path, self._texts)

    def forget_local(self) -> None:
        """The attempt is over and all of it is stored: free the disk of it, and of inputs long unused."""
        forget_local(self._run.path)
        days = self._settings.unreferenced_days
        self._try(lambda: self._storage.evict(days * 86_400, self._used_here()), "old copies stay on this disk")

    def _used_here(self) -> set[Path]:
        """What other attempts on this host read; one that was killed counts until its directory goes."""
        configs = [lease.with_name("config.json") for lease in self._settings.runs_dir.glob("*/attempt-*/lease")]
        return {path for config in configs if config.exists() for path in paths_in(json.loads(config.read_bytes()))}

    def _put(self, checkpoint: Checkpoint) -> None:
        if checkpoint.path not in self._stored:
            self._storage.put(checkpoint.path)
            self._stored.add(checkpoint.path)

    def _follow(self) -> None:
        looks = 0
        every = max(1, round(self._settings.storage_sync_seconds / LOOK_SECONDS))
        while not self._stop.wait(LOOK_SECONDS):
            for checkpoint in self._run.complete_checkpoints():
                if self._try(lambda one=checkpoint: self._put(one), f"{checkpoint.path.name} is not stored yet"):
                    continue
                if not checkpoint.path.exists():  # pruned under our hands: half of it may lie in the store
                    self._try(lambda one=checkpoint: self._storage.remove(one.path), "a half copy is left behind")
            if looks % every == 0:
                self._try(lambda: self._storage.put_texts(self._run.path, self._texts), "logs are not stored yet")
            looks += 1

    def _try(self, act, otherwise: str) -> bool:
        try:
            act()
        except StorageError as error:
            log.warning(otherwise, error=error.message)
            return False
        return True


def open_mirror(settings: Settings, claim: store.Claim) -> Mirror | None:
    """None: hosts share their data directory, and nothing is to be copied. Raises StorageError."""
    storage = open_storage(settings)
    return None if storage is None else Mirror(storage, settings, claim)
