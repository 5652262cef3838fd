"""Who calls, once Authentication knows: a key of a project, the service's own key, or this machine without a key."""

from __future__ import annotations

from dataclasses import dataclass

from service.jobs.tenancy import ALL_SCOPES, DEFAULT_PROJECT


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The caller of one request."""

    project: str
    name: str
    """In the audit log."""
    key_id: str | None = None
    """None: no stored key."""
    scopes: frozenset[str] = frozenset(ALL_SCOPES)
    requests_per_minute: int | None = None
    """None: the service's own limit."""

    @property
    def bucket(self) -> str:
        """Whose requests are counted together."""
        return self.key_id or self.name


OWN_KEY = Caller(project=DEFAULT_PROJECT, name="the service's own key")
"""VLM_DFT_API_KEY."""
THIS_MACHINE = Caller(project=DEFAULT_PROJECT, name="this machine, without a key")
