"""The servers that the other tests stand on are real."""

from __future__ import annotations

import redis
import sqlalchemy


def test_redis_fixture_is_a_real_server(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    assert client.set("key", "value")
    assert client.info("server")["redis_version"]
    client.close()


def test_postgres_fixture_is_a_real_server(postgres_url: str) -> None:
    engine = sqlalchemy.create_engine(postgres_url)
    with engine.connect() as connection:
        assert "PostgreSQL" in connection.exec_driver_sql("select version()").scalar_one()
    engine.dispose()
