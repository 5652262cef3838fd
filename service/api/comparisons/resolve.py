"""From a request to arms that can be queued: each is resolved as its own request would be. Writes nothing."""

from __future__ import annotations

from service.api.comparisons.requests import CreateComparison
from service.api.fine_tuning.resolve import resolve_job
from service.api.once import Resolved
from service.errors import InvalidRequestError
from service.jobs.database import Database
from service.jobs.models import ModelRegistry
from service.settings import Settings


def resolve_arms(
    database: Database, project: str, body: CreateComparison, settings: Settings, registry: ModelRegistry
) -> dict[str, Resolved]:
    """Name -> job, in order. Raises InvalidRequestError naming the arm, or two arms that would do the same."""
    found: dict[str, Resolved] = {}
    for arm in body.all_arms():
        try:
            arm_job = resolve_job(database, project, body.job_of(arm), settings, registry)
        except InvalidRequestError as error:
            error.message = f"arm {arm.name}: {error.message.removeprefix(f'arm {arm.name}: ')}"
            error.param = f"job.{error.param}" if error.param and not error.param.startswith("arms") else "arms"
            raise
        for other, known in found.items():
            if known.new.config.train == arm_job.new.config.train:
                message = f"arms {other} and {arm.name} would train the same: give one another objective, rate or seed"
                raise InvalidRequestError(message, param="arms")
        found[arm.name] = arm_job
    return found
