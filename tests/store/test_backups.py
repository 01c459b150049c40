"""The backups that deploy/ ships, run as they are there: copies and dumps under traffic, and what is restored."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
import yaml

from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import SessionKey, StateStore
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store.records import record
from tests.store.services import Server

ROOT = Path(__file__).parents[2]
BACKUP = ROOT / "deploy" / "systemd" / "backup.sh"
DELTAMEM = Path(sys.executable).with_name("deltamem")
KEY = SessionKey("tenant", "session")


@contextmanager
def traffic(store: StateStore) -> Iterator[list[int]]:
    """One version after another is committed meanwhile; yields those that were."""
    told, over = [1], threading.Event()
    store.put(record(1, KEY), None)

    def commit() -> None:
        while not over.is_set():
            store.put(record(told[-1] + 1, KEY), record(told[-1], KEY).expect)
            told.append(told[-1] + 1)

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join()


def job(overlay: str) -> str:
    """The script of an overlay's CronJob."""
    path = ROOT / "deploy" / "kustomize" / "overlays" / overlay / "backup.yaml"
    [found] = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d["kind"] == "CronJob"]
    [container] = found["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-ec"]
    return str(container["args"][0])


def run(script: str, **env: str) -> None:
    path = f"{DELTAMEM.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-ec", script], env={**os.environ, "PATH": path, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("how", ["systemd", "kustomize"])
def test_a_copy_of_sqlite_under_traffic(how: str, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    backups.mkdir()
    for day in range(1, 16):  # older ones, of which the oldest go
        (backups / f"sessions-202601{day:02d}T021700Z.db").touch()
        os.utime(backups / f"sessions-202601{day:02d}T021700Z.db", (day, day))
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store, traffic(store) as told:
        before = told[-1]
        if how == "systemd":
            run(f"{BACKUP} {DELTAMEM} {tmp_path}/sessions.db {backups} 14")
        else:
            run(job("single").replace("/store/", f"{tmp_path}/").replace("/backups/", f"{backups}/"))
        after = told[-1]
    assert after > before, "nothing was committed meanwhile"
    kept = sorted(path.name for path in backups.iterdir())
    assert len(kept) == 14
    assert kept[0] == "sessions-20260103T021700Z.db"
    with closing(SQLiteStore(backups / kept[-1])) as copy:
        found = copy.get(KEY)
    assert found is not None
    assert before <= found.version <= after + 1
    assert found.end.tobytes() == record(found.version, KEY).end.tobytes()


def test_a_damaged_copy_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    with closing(SQLiteStore(tmp_path / "sessions.db")) as store:
        store.put(record(1, KEY), None)
    damaging = tmp_path / "deltamem"  # a disk that loses what it was given
    damaging.write_text(
        f'#!/bin/sh\n{DELTAMEM} "$@" || exit\n'
        f'case $2 in backup) {sys.executable} -c "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); '
        'c.execute(\'UPDATE versions SET blob = zeroblob(length(blob))\'); c.commit()" "$3";; esac\n'
    )
    damaging.chmod(0o755)
    command = [BACKUP, damaging, tmp_path / "sessions.db", tmp_path / "backups", "14"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "1 damage" in done.stdout + done.stderr
    assert list((tmp_path / "backups").iterdir()) == []


def test_a_dump_of_postgres_under_traffic(postgres_server: Server, tmp_path: Path) -> None:
    place = f"postgresql://test@127.0.0.1:{postgres_server.port}"
    with psycopg.connect(f"{place}/postgres", autocommit=True) as connection:
        for name in ("backup_from", "backup_to"):
            connection.execute(f"CREATE DATABASE {name}")
    with closing(PostgresStore(f"{place}/backup_from")) as store, traffic(store) as told:
        before = told[-1]
        script = job("replicas").replace("/backups/", f"{tmp_path}/")
        run(script, STORE=f"{place}/backup_from", PGPASSWORD="unused")
        after = told[-1]
    [dump] = tmp_path.glob("*.dump")
    assert re.fullmatch(r"deltamem-\d{8}T\d{6}Z\.dump", dump.name)
    run(f"pg_restore --exit-on-error --no-owner --dbname={place}/backup_to {dump}")
    run(f"deltamem store check --store {place}/backup_to")
    with closing(PostgresStore(f"{place}/backup_to")) as restored:
        found = restored.get(KEY)
        assert found is not None
        assert before <= found.version <= after + 1
        restored.put(record(found.version + 1, KEY), found.expect)
