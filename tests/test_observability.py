"""Alerts, dashboard and scrape configuration: read by real parsers, and every name in them is one that is exposed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from api_server import serve
from compose import read_compose
from databases import copied_sqlite
from history_for_tests import some_history
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select, update

from service.jobs.tables import Worker

REPOSITORY = Path(__file__).parent.parent
OBSERVABILITY = REPOSITORY / "observability"
SECRETS = dict.fromkeys(("VLM_DFT_API_KEY", "VLM_DFT_SECRET", "POSTGRES_PASSWORD", "VALKEY_PASSWORD"), "x")
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds."""


def read_yaml(name: str) -> Any:
    return yaml.safe_load((OBSERVABILITY / name).read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml("prometheus/rules.yml")["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((OBSERVABILITY / "grafana/dashboards/vlm-dft.json").read_text())


def targets() -> list[dict[str, Any]]:
    return [target for panel in dashboard()["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path) -> dict[str, set[str]]:
    """What a service that has lived exposes: the names of samples, and the labels of each."""
    labels: dict[str, set[str]] = {}
    directory = tmp_path_factory.mktemp("exposed")
    with serve(directory, copied_sqlite(_sqlite_template, directory / "one.db")) as api:
        some_history(api.database)
        with api.database.write() as s:
            (worker,) = s.scalars(select(Worker)).all()
            devices = [{**worker.devices[0], "temperature_celsius": 50}]
            s.execute(update(Worker).values(devices=devices))
        for family in text_string_to_metric_families(api.http().get("/metrics").text):
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels | {"up": set()}


def parts(expression: Any) -> Iterator[Any]:
    """An expression and everything within it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "param", "vector_selector", "vs"):
        inner = getattr(expression, name, None)
        if isinstance(inner, promql.Expr):
            yield from parts(inner)
    for argument in getattr(expression, "args", None) or []:
        yield from parts(argument)


def selectors(query: str) -> list[Any]:
    """Every metric that a query reads; a syntax error raises."""
    found = [one for one in parts(promql.parse(query)) if isinstance(one, promql.VectorSelector)]
    assert found, query
    return found


def queries() -> list[str]:
    return [rule["expr"] for rule in rules()] + [target["expr"] for target in targets()]


def test_every_name_and_label_in_alerts_and_dashboard_is_exposed(exposed: dict[str, set[str]]) -> None:
    for query in queries():
        for selector in selectors(query):
            assert selector.name in exposed, query
            known = exposed[selector.name] | SCRAPED
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= known, (query, matched - known)
        grouped = {
            label.strip() for labels in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in labels.split(",")
        }
        known = {label for selector in selectors(query) for label in exposed[selector.name]}
        assert grouped - {""} <= known, query
    for target in targets():
        used = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
        (first, *_) = selectors(target["expr"])
        assert used <= exposed[first.name], target


def test_the_dashboard_shows_every_metric_that_is_exposed(exposed: dict[str, set[str]]) -> None:
    shown = {selector.name for query in queries() for selector in selectors(query)}
    assert {name for name in exposed if name.startswith("vlm_dft_")} <= shown


def test_a_misspelt_metric_would_be_found(exposed: dict[str, set[str]]) -> None:
    (selector,) = selectors("rate(vlm_dft_atempts_total[5m])")
    assert selector.name not in exposed
    with pytest.raises(ValueError, match="unclosed"):
        selectors("sum by (queue (vlm_dft_jobs)")


def test_every_alert_says_how_bad_what_and_what_to_do() -> None:
    headings = {
        "#" + line.removeprefix("### ").strip().lower().replace(" ", "-")
        for line in (REPOSITORY / "docs/operations.md").read_text().splitlines()
        if line.startswith("### ")
    }
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 5
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert {"summary", "description", "runbook"} == set(rule["annotations"])
        document, anchor = rule["annotations"]["runbook"].split("#")
        assert (REPOSITORY / document).is_file()
        assert f"#{anchor}" in headings, anchor
        if "for" in rule:
            assert promql.parse_duration(rule["for"]).total_seconds() >= 60


def test_compose_mounts_what_prometheus_and_grafana_read() -> None:
    document = read_compose(SECRETS)
    services = document["services"]
    prometheus, grafana = services["prometheus"], services["grafana"]
    assert prometheus["profiles"] == grafana["profiles"] == ["observability"]
    mounts = {}
    for service in (prometheus, grafana):
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("./"):
                mounts[target] = REPOSITORY / source
            else:
                assert source in document["volumes"], source
    configuration = read_yaml("prometheus/prometheus.yml")
    for path in configuration["rule_files"]:
        folder, name = path.rsplit("/", 1)
        assert (mounts[folder] / name).is_file()
    (scrape,) = configuration["scrape_configs"]
    secret = scrape["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in prometheus["secrets"]
    assert document["secrets"][secret] == {"environment": "VLM_DFT_API_KEY"}
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert port in services[host]["command"]
    (provider,) = read_yaml("grafana/provisioning/dashboards/vlm-dft.yml")["providers"]
    assert (mounts[provider["options"]["path"]] / "vlm-dft.json").is_file()
    assert (mounts["/etc/grafana/provisioning"] / "datasources/prometheus.yml").is_file()
    for name, service in services.items():
        assert name in {"prometheus", "grafana"} or "profiles" not in service


def test_the_dashboards_panels_have_the_provisioned_source_and_do_not_overlap() -> None:
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == source["uid"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
