"""Two servers on one store: a session moves between them, and a race is decided by its version."""

from pathlib import Path

import numpy as np
import pytest

from deltamem_vllm.sessions.service import SessionService
from tests.sessions.harness import Scenario, admit, drive_services, end_of, key, make_service, memory, on, run, turn


def drive_two(folder: Path, scenario: Scenario) -> None:
    """Run a scenario on two services of one SQLite file."""
    url = f"sqlite:///{folder}/s.db"
    drive_services(make_service(url), make_service(url), scenario)


def test_a_session_moves_between_servers(tmp_path: Path) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        told = []
        for number in range(6):
            server = (first, second)[number % 2]
            told.append(number + 1)
            outcome = await on(server, turn(server, "s", [number + 1], [0]))
            assert (outcome["status"], outcome["version"]) == ("committed", number + 1)
        np.testing.assert_array_equal(end_of(first, "s"), memory(None, told))

    drive_two(tmp_path, scenario)


def test_readers_see_what_another_server_committed(tmp_path: Path) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        await on(first, turn(first, "s", [1], [0]))
        assert (await on(second, admit(second, "s", [9], "read")))["version"] == 1
        await on(first, turn(first, "s", [2], [0]))
        assert (await on(second, admit(second, "s", [9], "read")))["version"] == 2

    drive_two(tmp_path, scenario)


@pytest.mark.parametrize("winner", [0, 1])
def test_a_race_has_one_winner_and_the_loser_is_told(tmp_path: Path, winner: int) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        await on(first, turn(first, "s", [1], [0]))
        servers = [first, second]
        granted = [await on(server, admit(server, "s", [2 + i])) for i, server in enumerate(servers)]
        order = [winner, 1 - winner]
        statuses = []
        for i in order:
            outcome = await on(servers[i], run(servers[i], granted[i]["ticket"], [2 + i], [0]))
            statuses.append(outcome["status"])
        assert statuses == ["committed", "conflict"]
        np.testing.assert_array_equal(end_of(first, "s"), memory(None, [1, 2 + winner]))
        loser = servers[1 - winner]
        assert (await on(loser, turn(loser, "s", [7], [0])))["version"] == 3
        np.testing.assert_array_equal(end_of(first, "s"), memory(None, [1, 2 + winner, 7]))

    drive_two(tmp_path, scenario)


def test_a_deletion_on_another_server_is_noticed(tmp_path: Path) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        await on(first, turn(first, "s", [1], [0]))
        before = first.directory.get(key("s")).incarnation
        assert await on(second, second.delete(key("s")))
        outcome = await on(first, turn(first, "s", [2], [0]))
        assert (outcome["status"], outcome["version"]) == ("committed", 1)
        record = first.store.get(key("s"))
        assert record is not None
        assert record.incarnation != before, "a session that was deleted anywhere starts another life"
        np.testing.assert_array_equal(record.end, memory(None, [2]))

    drive_two(tmp_path, scenario)
