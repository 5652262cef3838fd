"""The application: `uvicorn --factory service.api.app:create_app`. Puts the parts together and knows no resource.

Run it with --no-access-log (RequestContext logs each request once) and a --timeout-graceful-shutdown, because event
streams stay open as long as their jobs run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import structlog
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware

from service import logs, tracing
from service.api import expiry
from service.api.authentication import Authentication
from service.api.closing import watched_signals
from service.api.comparisons import router as comparisons
from service.api.context import QUIET_PATHS, VERSION, RequestContext
from service.api.errors import ErrorBody, install_error_rendering
from service.api.evaluations import router as evaluations
from service.api.files import router as files
from service.api.files.storage import prepare_directory
from service.api.fine_tuning import estimates, objectives, outputs, preflights, preview
from service.api.fine_tuning import router as fine_tuning
from service.api.models import router as models
from service.api.openapi import complete_schema
from service.api.operations import router as operations
from service.api.outputs_here import outputs_here
from service.api.reports import router as reports
from service.api.tenancy import router as tenancy
from service.api.uploads import router as uploads
from service.api.webhooks import router as webhooks
from service.dashboard.router import install_dashboard
from service.jobs import keys, tenancy_audit
from service.jobs.database import open_database
from service.jobs.models import ModelRegistry
from service.jobs.queue import create_celery, flush_outbox, prepare_broker
from service.settings import Settings, get_settings
from service.storage import open_storage

log = structlog.get_logger("service.api")

_errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application for these settings, by default those of the environment. Its database must exist migrated."""
    settings = settings or get_settings()
    logs.configure()
    tracing.configure("api")
    settings.data.mkdir(parents=True, exist_ok=True)
    prepare_directory(settings)
    prepare_broker(settings)
    open_storage(settings)
    database = open_database(settings)
    database.before_commit.append(tenancy_audit.record)
    celery = create_celery(settings)
    app = FastAPI(
        title="vlm-dft",
        version=VERSION,
        description="OpenAI-compatible fine-tuning of Qwen2.5-VL and text models, with DFT.",
        docs_url=None,  # their pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        generate_unique_id_function=_operation_id,
        middleware=[
            Middleware(RequestContext, max_body_bytes=settings.max_body_bytes),
            Middleware(Authentication, settings=settings, database=database, secret=keys.load_secret(settings)),
        ],
        responses=_errors,
        # Its own log and metrics exporters stay off: ours are structlog and /metrics, and hold no error texts.
        telemetry={"logs": False, "metrics": False, "operation_spans": False, "exclude": _is_probe},
    )
    app.state.settings = settings
    app.state.database = database
    app.state.registry = ModelRegistry(settings)
    app.state.celery = celery
    app.state.wake_up = partial(flush_outbox, database, celery)
    install_error_rendering(app)
    complete_schema(app)
    for resource in (files, uploads, fine_tuning, outputs, comparisons, evaluations, models, webhooks, tenancy):
        app.include_router(resource.router, dependencies=[Depends(outputs_here)])
    for resource in (preflights, estimates, preview, objectives, reports):
        app.include_router(resource.router, dependencies=[Depends(outputs_here)])
    app.include_router(operations.router)
    install_dashboard(app)
    return app


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    """Nobody wants to trace what asks every few seconds."""
    return scope.get("path") in QUIET_PATHS


def _operation_id(route: APIRoute) -> str:
    """The function's name: unique, and what a generated client would want to call it."""
    return route.name


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    database = app.state.database
    if not await anyio.to_thread.run_sync(database.at_head):
        database.close()
        raise RuntimeError("the database is not at this version's schema: run `vlm-dft migrate` first")
    with watched_signals() as app.state.closing:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sweep_now_and_then, app)
            yield
            tasks.cancel_scope.cancel()
    database.close()


async def _sweep_now_and_then(app: FastAPI) -> None:
    while True:
        try:
            await anyio.to_thread.run_sync(expiry.sweep, app.state.database, app.state.settings)
        except (SQLAlchemyError, OSError):
            log.exception("the sweep failed and will be repeated")
        await anyio.sleep(expiry.SWEEP_SECONDS)
