"""docker compose up, rehearsed: its own commands and environments against a real Redis and a real PostgreSQL."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import psycopg
import pytest
import redis
from compose import MissingVariableError, Rehearsal, interpolate, read_compose, start_order
from throwaway import free_port, postgres_server, redis_binary, wait_until
from uploads_for_tests import wethink_archive

from vlm_dft.tiny import build_tiny_vlm

SECRETS = {
    "POSTGRES_PASSWORD": "postgres-password",
    "VALKEY_PASSWORD": "valkey-password",
    "VLM_DFT_SECRET": "a-secret-for-hmac",
    "VLM_DFT_API_KEY": "vdft-key-of-the-rehearsal",
}
OURS = ("api", "janitor", "cpu-worker", "gpu-worker")


def test_compose_refuses_to_start_without_its_secrets() -> None:
    for name in SECRETS:
        with pytest.raises(MissingVariableError):
            read_compose({key: value for key, value in SECRETS.items() if key != name})


def test_interpolation_follows_compose_rules() -> None:
    assert interpolate("${A}-${B:-two}-${C:-}", {"A": "one"}) == "one-two-"


def test_every_service_waits_for_migrations_and_has_a_grace_period() -> None:
    services = read_compose(SECRETS)["services"]
    order = start_order(services)
    for name in OURS:
        assert order.index("postgres") < order.index("migrate") < order.index(name)
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
        assert services[name]["stop_grace_period"]
        assert services[name]["restart"] == "unless-stopped"
    assert services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert "--appendonly" in services["valkey"]["command"]


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[Rehearsal]:
    document = read_compose(SECRETS)
    services = document["services"]
    valkey_port, api_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="vlm-dft-postgres-") as cluster:
        Path(cluster).chmod(0o755)
        with postgres_server(Path(cluster)) as postgres_url:
            port = postgres_url.rsplit(":", 1)[1].split("/")[0]
            with psycopg.connect(f"postgresql://vlm_dft@127.0.0.1:{port}/postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE vlm_dft")
            for name in ("data", "models", "benchmarks", "datasets"):
                (tmp_path / name).mkdir()
            replacements = {
                "@postgres:5432": f"@127.0.0.1:{port}",
                "@valkey:6379": f"@127.0.0.1:{valkey_port}",
                "/data": str(tmp_path / "data"),
                "/models": str(tmp_path / "models"),
                "/benchmarks": str(tmp_path / "benchmarks"),
                '"/datasets"': f'"{tmp_path / "datasets"}"',
                "0.0.0.0": "127.0.0.1",
                "8000": str(api_port),
            }
            run = Rehearsal(services, replacements, tmp_path)
            with _valkey(services["valkey"]["command"], valkey_port, tmp_path):
                try:
                    yield run
                finally:
                    run.stop()


class _valkey:  # noqa: N801 - reads as a function
    """The compose file's valkey command, with this machine's binary, on a free port."""

    def __init__(self, command: list[str], port: int, directory: Path) -> None:
        binary = redis_binary()
        assert binary, "no redis-server"
        assert command[0] == "valkey-server"
        place = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory / "data")]
        self.command, self.port = [binary, *command[1:], *place], port

    def __enter__(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port, password=SECRETS["VALKEY_PASSWORD"])
        wait_until(lambda: _pings(client), 10, "valkey answers its health check")
        client.close()

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.e2e
@pytest.mark.timeout(280)
def test_compose_services_run_a_dft_job_from_upload_to_model(rehearsal: Rehearsal, tmp_path: Path) -> None:
    build_tiny_vlm(tmp_path / "models" / "tiny-vl")
    migrated = rehearsal.run("migrate")
    assert migrated.returncode == 0, migrated.stderr.decode()
    for name in OURS:
        rehearsal.start(name)
    wait_until(lambda: rehearsal.healthy("api"), 60, "the api's own health check passes", interval=1)

    client = openai.OpenAI(
        base_url=rehearsal.local("http://127.0.0.1:8000/v1"),
        api_key=SECRETS["VLM_DFT_API_KEY"],
        _strict_response_validation=True,
    )
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    archive = wethink_archive(tmp_path / "train.tar.gz", rows=8)
    file = client.files.create(file=archive, purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.5, max_wait_seconds=60).status == "processed"
    supervised = {"objective": "dft", "hyperparameters": {"batch_size": 4, "n_epochs": 2, "sample_rows": 0}}
    job = client.fine_tuning.jobs.create(
        model="tiny-vl",
        training_file=file.id,
        method={"type": "supervised", "supervised": supervised},
    )
    job = wait_until(lambda: _ended(client, job.id), 120, "the job ends", interval=0.5)
    assert job.status == "succeeded", job.error
    assert job.trained_tokens
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    # 0, or the SIGTERM that uvicorn raises again once it has shut down; -9 would be a grace period exceeded.
    assert set(rehearsal.stop().values()) <= {0, -signal.SIGTERM}


def _ended(client: openai.OpenAI, job_id: str):
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in {"succeeded", "failed", "cancelled"} else None
