"""The handle on a server: whatever happens, nothing of it stays behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamem_vllm.demo.server import ServerFailed, VllmServer, environment, group_members

STAND_IN = Path(__file__).with_name("stand_in.py")


class StandIn(VllmServer):
    """A handle that starts the stand-in."""

    def __init__(self, how: str, log: Path) -> None:
        super().__init__("model", "adapter", "memory://", log=log)
        self.command = [sys.executable, str(STAND_IN), str(self.port), how]


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(getattr(request, "param", "polite"), tmp_path / "server.log") as running:
        yield running


def test_kill_takes_the_whole_group_and_the_port_serves_again(server: StandIn) -> None:
    address = server.base_url
    for _ in range(2):
        server.wait_ready(timeout=20)
        group = server.pid
        assert group is not None
        assert len(group_members(group)) == 2  # it and its child
        server.kill()
        assert group_members(group) == []
        assert server.pid is None
        assert not server.healthy()
        server.start()
    server.wait_ready(timeout=20)
    assert server.base_url == address


@pytest.mark.parametrize("server", ["polite", "stubborn"], indirect=True)
def test_stop_ends_children_too_and_those_who_do_not_listen(server: StandIn) -> None:
    server.wait_ready(timeout=20)
    group = server.pid
    assert group is not None
    server.stop(timeout=1.0)
    assert group_members(group) == []
    server.stop()  # again does nothing


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    group = None

    def interrupted() -> None:
        nonlocal group
        with StandIn("polite", tmp_path / "server.log") as server:
            server.wait_ready(timeout=20)
            group = server.pid
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert group is not None
    assert group_members(group) == []


@pytest.mark.parametrize("server", ["broken"], indirect=True)
def test_a_server_that_ends_is_reported_with_its_last_words(server: StandIn) -> None:
    with pytest.raises(ServerFailed, match=r"ended with 1 before it was ready(.|\n)*the model is not there"):
        server.wait_ready(timeout=20)


def test_waiting_has_an_end_and_is_reported(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "healthy", lambda: False)
    waited: list[float] = []
    with pytest.raises(ServerFailed, match=r"not ready after 1 s(.|\n)*stand-in polite"):
        server.wait_ready(timeout=1, waiting=waited.append)
    assert waited == sorted(waited)
    assert waited


def test_it_cannot_be_started_twice(server: StandIn) -> None:
    with pytest.raises(RuntimeError, match="runs already"):
        server.start()


def test_settings_of_this_process_do_not_leak_into_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_STORE", "memory://")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    made = environment()
    assert "DELTAMEM_STORE" not in made
    assert "VLLM_PLUGINS" not in made
    assert made["OMP_NUM_THREADS"] == "7"


def test_the_command_is_the_one_that_readme_shows(tmp_path: Path) -> None:
    server = VllmServer("MODEL", "DIR", "memory://", "--dtype", "float32", port=8000, log=tmp_path / "log")
    said = " ".join(server.command[1:])
    assert said == (
        "serve MODEL --host 127.0.0.1 --port 8000 --plugin deltamem --deltamem-adapter DIR "
        "--deltamem-store memory:// --dtype float32"
    )
    assert "--plugin" not in VllmServer("MODEL", None, "memory://", log=tmp_path / "log").command


def test_group_members_does_not_count_the_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert group_members(child.pid) == []
    child.wait()
