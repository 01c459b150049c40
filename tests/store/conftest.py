"""The servers of the store tests: one PostgreSQL and one Redis per run, a fresh database per test."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import psycopg
    import redis  # noqa: F401
except ImportError as error:  # a skipped test would hide a broken store
    raise pytest.UsageError(f"the store tests need {error.name}: pip install 'deltamem-vllm[test]'") from None

from tests.store import services

_numbers = itertools.count()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory where there is one: for tests that sync often and are not about the disk."""
    with tempfile.TemporaryDirectory(prefix="deltamem-", dir=services.FOLDER) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[services.Server]:
    """A PostgreSQL server; a test that needs it fails if it is not installed, and says how to install it."""
    with services.postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: services.Server) -> Iterator[str]:
    """A fresh database."""
    name = f"test_{next(_numbers)}"
    admin = f"postgresql://test@127.0.0.1:{postgres_server.port}/postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"postgresql://test@127.0.0.1:{postgres_server.port}/{name}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[services.Server]:
    """A Redis server that syncs each write; fails as above."""
    with services.redis() as server:
        yield server


@pytest.fixture
def redis_place(redis_server: services.Server) -> tuple[str, str]:
    """A URL and a fresh namespace."""
    return f"redis://127.0.0.1:{redis_server.port}/0", f"test*{next(_numbers)}"
