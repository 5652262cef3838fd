"""Serves the page and its parts. Public, because they hold nothing: all data comes from `/v1`, with the user's key.

Knows neither settings nor database.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC: Final = Path(__file__).parent / "static"
HEADERS: Final = {
    # blob: is how pictures are shown that need the key to be fetched.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # Asked each time and answered 304, so that the page of one version never meets the scripts of another.
    "cache-control": "no-cache",
}


class _Parts(StaticFiles):
    """The scripts and styles, with the headers of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


async def _page() -> FileResponse:
    """The page itself; which view it shows is after the #."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


def install_dashboard(app: FastAPI) -> None:
    """Put the page at `/` and its parts below `/dashboard`."""
    app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/dashboard", _Parts(directory=STATIC), name="dashboard")
