"""What endpoints ask for by type: settings, database, models, the caller's project, page parameters.

Endpoints open their own transactions (``with database.read() as s``), in the one thread that they run in, and close
them before they answer: a 2xx means committed. The functions here are async so that none costs a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from celery import Celery
from fastapi import Depends, Query, Request

from service.api.callers import Caller
from service.api.closing import Closing
from service.jobs.database import Database
from service.jobs.models import ModelRegistry
from service.settings import Settings


async def settings_of(request: Request) -> Settings:
    return request.app.state.settings


async def database_of(request: Request) -> Database:
    return request.app.state.database


async def registry_of(request: Request) -> ModelRegistry:
    return request.app.state.registry


async def caller_of(request: Request) -> Caller:
    """Who calls, with key and scopes; Authentication has put it there."""
    return request.state.caller


async def project_of(request: Request) -> str:
    """The project of the caller's key; Authentication has put it there."""
    return request.state.project


SettingsNow = Annotated[Settings, Depends(settings_of)]
DatabaseNow = Annotated[Database, Depends(database_of)]
RegistryNow = Annotated[ModelRegistry, Depends(registry_of)]
Project = Annotated[str, Depends(project_of)]
CallerNow = Annotated[Caller, Depends(caller_of)]


After = Annotated[str | None, Query(max_length=255, description="Id of the last object of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most objects in one page.")]


async def wake_up_of(request: Request) -> Callable[[], object]:
    """Publishes the wake-ups of what was just submitted, once and quickly; the janitor repeats what fails."""
    return request.app.state.wake_up


WakeUp = Annotated[Callable[[], object], Depends(wake_up_of)]


async def celery_of(request: Request) -> Celery:
    return request.app.state.celery


CeleryNow = Annotated[Celery, Depends(celery_of)]


async def closing_of(request: Request) -> Closing:
    """Whether the process was asked to end: for answers that would stay open."""
    return request.app.state.closing


ClosingNow = Annotated[Closing, Depends(closing_of)]
