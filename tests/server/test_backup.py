"""A backup of a SQLite store, taken under traffic and restored into a new server: what was told before is there, and
sessions go on from it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from deltamem_vllm.demo.server import VllmServer
from tests.server.conftest import FLAGS, HERE, MODEL
from tests.server.talk import Talk, distance, new_session, ok, outcome
from tests.server.test_server_kill import Committer, stored
from tests.store.test_backups import BACKUP, DELTAMEM
from tests.tolerances import SAME_MEMORY

FACT = list(range(64, 96))


@pytest.mark.timeout(600)
def test_a_backup_under_traffic_is_restored(server: VllmServer, talk: Talk, adapter: Path, tmp_path: Path) -> None:
    store, backups = server.log.with_name("sessions.db"), tmp_path / "backups"
    backups.mkdir()
    quiet = new_session()
    ok(talk.complete(FACT, quiet))
    before = talk.probe(quiet)
    clients = [Committer(server.base_url, new_session(), number) for number in range(3)]
    for client in clients:
        client.start()
    while any(client.told < 2 for client in clients):
        assert not any(client.wrong for client in clients), [client.wrong for client in clients]
    told = {client.session: client.told for client in clients}
    subprocess.run([BACKUP, DELTAMEM, store, backups, "14"], check=True, capture_output=True, timeout=120)
    later = {client.session: client.told for client in clients}
    for client in clients:
        client.wrong = client.wrong or "over"  # its thread ends after this turn
    [copy] = backups.iterdir()
    assert any(later[session] > told[session] for session in told), "nothing was committed meanwhile"

    # The procedure of docs/deployment.md, into a new folder.
    restored = tmp_path / "restored" / "sessions.db"
    restored.parent.mkdir()
    shutil.copy(copy, restored)
    versions = {session: stored(restored, session)[0] for session in told}
    for session, version in versions.items():
        assert told[session] <= version <= later[session] + 1
    with VllmServer(MODEL, adapter, f"sqlite:///{restored}", *FLAGS, env=HERE, log=tmp_path / "log") as second:
        second.wait_ready()
        with Talk(second.base_url) as again:
            assert distance(again.probe(quiet), before) <= SAME_MEMORY
            assert outcome(again.complete([5, 6, 7], quiet)) == (quiet, "2", "committed")
            for session, version in versions.items():
                assert outcome(again.complete([5, 6, 7], session)) == (session, f"{version + 1}", "committed")
