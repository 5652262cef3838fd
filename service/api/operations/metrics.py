"""/metrics for Prometheus: what ``service.jobs.metrics`` finds, and what only this host knows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.api.dependencies import DatabaseNow, SettingsNow
from service.jobs.metrics import collect
from service.settings import Settings

router = APIRouter(tags=["operations"])


class _Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def prometheus_metrics(request: Request, database: DatabaseNow, settings: SettingsNow) -> Any:
    """Totals of the whole service in Prometheus's text form; asks for an API key where /v1 does."""
    began = time.perf_counter()
    with database.read() as s:
        metrics = list(collect(s, settings))
    metrics += _of_host(settings)
    words = "Time that this scrape took."
    metrics.append(GaugeMetricFamily("vlm_dft_scrape_seconds", words, value=time.perf_counter() - began))
    registry = CollectorRegistry()
    registry.register(_Collected(metrics))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"content-type": content_type})


def _of_host(settings: Settings) -> list[Metric]:
    usage = shutil.disk_usage(settings.data)
    return [
        GaugeMetricFamily("vlm_dft_disk_free_bytes", "Free space beside the data directory.", value=usage.free),
        GaugeMetricFamily("vlm_dft_disk_total_bytes", "Size of the data directory's disk.", value=usage.total),
    ]
