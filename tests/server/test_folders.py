"""The control sockets' folders: what a killed server left is removed by the next, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamem_vllm import folders

ROOT = Path(__file__).parents[2]
MAKE = "import sys; from deltamem_vllm import folders; print(folders.make(), flush=True); sys.stdin.read()"
HOLD = "import sys; from deltamem_vllm import folders; folders.hold(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def _in_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    monkeypatch.undo()


def run(script: str, *arguments: str) -> "tuple[subprocess.Popen[str], str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]", kill: bool) -> None:
    if kill:
        process.kill()
    process.communicate(timeout=30)


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed, left = run(MAKE)
    alive, used = run(MAKE)
    engine, _ = run(HOLD, left)
    try:
        end(killed, kill=True)
        assert Path(left).is_dir()
        first = Path(folders.make())
        assert Path(left).is_dir(), "an engine of the killed server still uses it"
        end(engine, kill=True)
        (Path(left) / "engine-0").touch()
        second = Path(folders.make())
        assert not Path(left).exists()
        assert Path(used).is_dir(), "its server lives"
        assert first.is_dir(), "it is ours"
        assert second.is_dir()
    finally:
        end(engine, kill=True)
        end(alive, kill=False)
    assert not Path(used).exists(), "a server that ends removes its own"


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "owner").touch()
    kept = [tmp_path / f"deltamem-{name}" for name in ("file", "link", "nobodys", "open", "linked-owner")]
    kept[0].touch()
    kept[1].symlink_to(elsewhere)
    kept[2].mkdir(mode=0o700)  # another program's, or one that is just being made
    kept[3].mkdir(mode=0o755)
    (kept[3] / "owner").touch()
    kept[4].mkdir(mode=0o700)
    (kept[4] / "owner").symlink_to(elsewhere / "owner")
    folders.make()
    assert all(path.exists() for path in kept)
    assert (elsewhere / "owner").exists()


def test_holding_a_folder_without_an_owner_does_no_harm(tmp_path: Path) -> None:
    folders.hold(str(tmp_path))
    folders.hold("")
