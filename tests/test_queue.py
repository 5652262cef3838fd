"""Wake-ups: published to a real Redis and to the filesystem transport, and a broker that is gone, silent or full."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery
from sqlalchemy import select
from store_samples import new_file, new_job
from throwaway import redis_binary, redis_server, wait_until

from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.queue import WAKE, create_celery, flush_outbox, prepare_broker, publish, publish_many
from service.jobs.tables import Outbox
from service.settings import Settings

# A worker that writes one line per wake-up.
WORKER = f"""
import os, sys
from service.jobs.queue import app

@app.task(name="{WAKE}")
def wake():
    with open(os.environ["WOKEN"], "a") as file:
        file.write("woken\\n")
"""


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[str]:
    """A Redis that this test may break."""
    assert redis_binary()
    with redis_server(tmp_path) as url:
        yield url


@pytest.fixture(params=["redis", "filesystem"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    if url is not None:
        redis.from_url(url).flushdb()
    made = Settings(data_dir=tmp_path / "data", broker_url=url)
    prepare_broker(made)
    return made


def timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def outbox_size(database: Database) -> int:
    with database.read() as s:
        return len(s.scalars(select(Outbox.id)).all())


def submit(database: Database) -> None:
    with database.write() as s:
        store.submit(s, new_job())
        new_file(s)


def test_a_worker_is_woken_by_what_was_published_before_it_started(settings: Settings, tmp_path: Path) -> None:
    celery = create_celery(settings)
    assert publish_many([Queue.GPU, Queue.GPU, Queue.CPU], celery) == 3
    (tmp_path / "woken_worker.py").write_text(WORKER)
    woken = tmp_path / "woken.txt"
    command = "-m celery -A woken_worker worker -P prefork -c 1 -Q gpu --without-mingle --without-gossip"
    environment = os.environ | {"WOKEN": str(woken), "VLM_DFT_DATA_DIR": str(settings.data), "PYTHONPATH": "."}
    if settings.broker_url:
        environment["VLM_DFT_BROKER_URL"] = settings.broker_url
    with (tmp_path / "log.txt").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, *command.split()], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: woken.exists() and woken.read_text().count("woken") == 2, 40, "two wake-ups arrive")
    finally:
        worker.terminate()
        worker.wait(20)
    assert worker.returncode == 0, (tmp_path / "log.txt").read_text()


def test_the_outbox_is_emptied_by_publishing(database: Database, settings: Settings) -> None:
    submit(database)
    submit(database)
    celery = create_celery(settings)
    assert flush_outbox(database, celery) == 4
    assert outbox_size(database) == 0
    assert flush_outbox(database, celery) == 0
    if settings.broker_url is None:
        sent = sorted(path.name.split(".")[1] for path in (settings.data / "queue" / "messages").iterdir())
        assert sent == ["cpu", "cpu", "gpu", "gpu"]
    else:
        server = redis.from_url(settings.broker_url)
        assert [server.llen(f"vlmdft:{queue}") for queue in Queue] == [2, 2]


def test_a_submit_outlives_a_broker_that_is_down(database: Database, own_redis: str) -> None:
    celery = create_celery(Settings(broker_url=own_redis))
    server = redis.from_url(own_redis)
    assert publish(Queue.GPU, celery)
    server.shutdown(nosave=True)
    with pytest.raises(redis.ConnectionError):
        server.ping()
    submit(database)
    assert timed(lambda: flush_outbox(database, celery)) < 3
    assert not publish(Queue.GPU, celery)
    assert outbox_size(database) == 2


def test_a_broker_that_refuses_does_not_raise(own_redis: str) -> None:
    server = redis.from_url(own_redis)
    celery = create_celery(Settings(broker_url=own_redis))
    server.config_set("maxmemory", 1)
    assert not publish(Queue.GPU, celery)  # out of memory
    server.config_set("maxmemory", 0)
    assert publish(Queue.GPU, celery)
    server.config_set("requirepass", "other")
    assert not publish(Queue.GPU, create_celery(Settings(broker_url=own_redis)))


def test_a_silent_broker_costs_about_a_second() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        celery = create_celery(Settings(broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))
        answers: list[bool] = []
        assert timed(lambda: answers.append(publish(Queue.GPU, celery))) < 3
    assert answers == [False]


def test_a_filesystem_broker_that_cannot_be_written_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    celery = create_celery(Settings(data_dir=tmp_path / "data"))
    assert not publish(Queue.GPU, celery)


def test_only_the_owner_may_enter_the_filesystem_brokers_folders(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    prepare_broker(settings)
    prepare_broker(settings)
    folders = [settings.data / "queue", *(settings.data / "queue").iterdir()]
    assert len(folders) == 4
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_messages_carry_no_state_and_control_is_off(tmp_path: Path) -> None:
    celery: Celery = create_celery(Settings(data_dir=tmp_path))
    conf = celery.conf
    assert conf.task_acks_late
    assert not conf.task_reject_on_worker_lost
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert not conf.worker_enable_remote_control
    assert not conf.worker_send_task_events
    assert conf.accept_content == ["json"]
    assert conf.result_backend is None
