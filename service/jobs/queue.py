"""Wake-ups over Celery. A message carries no state: losing, doubling or delaying it costs time, never a job.

Brokers: ``settings.broker_url``, else kombu's filesystem transport in the data directory. The body of the task is the
worker's; the API only ever sends its name.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from celery import Celery
from kombu import Queue as BrokerQueue  # pyright: ignore[reportPrivateImportUsage] - its __init__ is lazy
from kombu.exceptions import OperationalError
from sqlalchemy import delete, select

from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.tables import Outbox
from service.settings import Settings, get_settings

WAKE: Final = "vlm_dft.wake"
"""The one task: claim jobs until none waits."""
PUBLISH_SECONDS: Final = 1.0
"""How long a publish may wait for the broker; the janitor tries again."""
FLUSH_ROWS: Final = 200
FILESYSTEM: Final = "filesystem://"

log = logging.getLogger(__name__)


def create_celery(settings: Settings) -> Celery:
    """A Celery application on the settings' broker."""
    celery = Celery("vlm_dft")
    celery.conf.update(
        broker_url=settings.broker_url or FILESYSTEM,
        broker_transport_options=_transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # the default gives up after 100
        task_queues=[BrokerQueue(queue.value) for queue in Queue],
        task_default_queue=Queue.GPU.value,
        task_create_missing_queues=False,
        task_acks_late=True,
        task_reject_on_worker_lost=False,  # the lease recovers the job, with a limit on attempts
        task_ignore_result=True,
        task_publish_retry=False,  # the janitor repeats it
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # Celery 6 flips it
        worker_soft_shutdown_timeout=2.0,
        worker_enable_remote_control=False,  # liveness, cancel and devices go through the database
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return celery


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.broker_url is None:
        folder = settings.data / "queue"
        messages = str(folder / "messages")
        return {
            "data_folder_in": messages,
            "data_folder_out": messages,
            "processed_folder": str(folder / "processed"),
            "control_folder": str(folder / "control"),
            "store_processed": False,
        }
    return {
        # Redis redelivers a message this long after its delivery, whether its worker lives or not.
        "visibility_timeout": 86400,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "global_keyprefix": "vlmdft:",
    }


def prepare_broker(settings: Settings) -> None:
    """Make the filesystem transport's folders, which only their owner may enter. Nothing to do for a server."""
    if settings.broker_url is None:
        folder = settings.data / "queue"
        settings.data.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("messages", "processed", "control"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)


app = create_celery(get_settings())


def publish(queue: Queue | str, celery: Celery = app) -> bool:
    """Send one wake-up, waiting at most about PUBLISH_SECONDS for the broker. False: it could not be sent."""
    return publish_many([queue], celery) == 1


def publish_many(queues: list[Queue | str], celery: Celery = app) -> int:
    """Send wake-ups over one connection until one fails; returns how many were sent."""
    options = dict(celery.conf.broker_transport_options)
    if celery.conf.broker_url != FILESYSTEM:
        options |= {"socket_connect_timeout": PUBLISH_SECONDS, "socket_timeout": PUBLISH_SECONDS, "max_retries": 0}
    connection = celery.connection_for_write(transport_options=options, connect_timeout=PUBLISH_SECONDS)
    sent = 0
    try:
        with connection:
            for queue in queues:
                celery.send_task(WAKE, queue=str(queue), connection=connection, retry=False, ignore_result=True)
                sent += 1
    # Down, silent, full, or asking for another password: what the transport calls its errors.
    except (OSError, OperationalError, *connection.connection_errors, *connection.channel_errors) as error:
        log.warning("the broker took %d of %d wake-ups; the janitor will try again: %s", sent, len(queues), error)
    return sent


def flush_outbox(database: Database, celery: Celery = app) -> int:
    """Publish the outbox's wake-ups, then delete their rows; returns how many were sent. Never raises for a broker.

    Not inside one transaction: a slow broker would block every writer. A crash between sending and deleting only
    doubles wake-ups, which is harmless.
    """
    with database.read() as s:
        rows = s.execute(select(Outbox.id, Outbox.queue).order_by(Outbox.id).limit(FLUSH_ROWS)).all()
    sent = publish_many([row.queue for row in rows], celery) if rows else 0
    if sent:
        with database.write() as s:
            s.execute(delete(Outbox).where(Outbox.id.in_([row.id for row in rows[:sent]])))
    return sent
