"""Settings: flags over environment over defaults, and errors that say what to do."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltamem_vllm.config import CONNECTOR, PLUGIN, Settings, resolve, settings_of
from deltamem_vllm.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("DELTAMEM_")]:
        monkeypatch.delenv(name)


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = resolve({"adapter": "/some/adapter"})
    assert settings.model_dump() == {
        "adapter": "/some/adapter",
        "store": f"sqlite:///{tmp_path}/deltamem/sessions.db",
        "session_slots": 1024,
        "session_header": "X-Session-ID",
        "queue_depth": 8,
        "queue_seconds": 30.0,
        "durability": "sync",
        "write_behind_seconds": 1.0,
        "write_behind_versions": 1024,
        "host_bytes": 256 << 20,
        "ttl": 0.0,
        "write": "system,user,assistant",
        "history": "full",
        "history_keep": 2,
        "facts_chars": 8000,
        "facts_block": "",
        "audit": "",
        "audit_required": False,
        "kernel": "auto",
        "ui": False,
        "key_file": "",
        "open": False,
        "secret_file": "",
        "control": "",
    }


def test_a_flag_beats_the_environment_and_the_environment_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_ADAPTER", "/from/environment")
    monkeypatch.setenv("DELTAMEM_QUEUE_DEPTH", "3")
    monkeypatch.setenv("DELTAMEM_SESSION_SLOTS", "17")
    monkeypatch.setenv("DELTAMEM_STORE", "memory://")
    monkeypatch.setenv("DELTAMEM_CONTROL", "/from/environment")
    settings = resolve({"queue_depth": 5, "session_slots": None})
    assert settings.control == "", "the sockets' folder is made at start and nobody's to choose"
    assert (settings.adapter, settings.queue_depth, settings.session_slots) == ("/from/environment", 5, 17)
    assert settings.store == "memory://"
    assert resolve({"adapter": "/from/flag"}).adapter == "/from/flag"


def test_zero_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_QUEUE_DEPTH", "3")
    assert resolve({"adapter": "a", "store": "memory://", "queue_depth": 0}).queue_depth == 0


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("256MiB", 256 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9)]
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    settings = resolve({"adapter": "a", "store": "memory://", "host_bytes": text})
    assert settings.host_bytes == size
    assert Settings(**settings.model_dump()) == settings, "as it travels to the other processes"


def test_write_behind_is_off_unless_asked_for() -> None:
    given = {"adapter": "a", "store": "memory://", "write_behind_versions": 7}
    assert resolve(given).write_behind is None
    assert resolve({**given, "durability": "write-behind"}).write_behind == (1.0, 7)


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolve({"adapter": "here", "store": "memory://"}).adapter == str(tmp_path / "here")
    assert resolve({"adapter": "~/there", "store": "memory://"}).adapter == "/home/somebody/there"


@pytest.mark.parametrize("given", [{}, {"adapter": ""}, {"adapter": None}])
def test_no_adapter(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--deltamem-adapter DIR \(or set DELTAMEM_ADAPTER\)"):
        resolve(given)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("session_slots", 0, "--deltamem-session-slots: .*greater than or equal to 1.*given: 0"),
        ("session_slots", "many", "--deltamem-session-slots: .*integer.*given: 'many'"),
        ("session_slots", 1 << 21, "--deltamem-session-slots"),
        ("queue_depth", -1, "--deltamem-queue-depth: .*given: -1"),
        ("queue_seconds", 0, "--deltamem-queue-seconds: .*greater than 0"),
        ("queue_seconds", "nan", "--deltamem-queue-seconds"),
        ("durability", "async", "--deltamem-durability: .*'sync' or 'write-behind'.*given: 'async'"),
        ("write_behind_seconds", 0, "--deltamem-write-behind-seconds: .*greater than 0"),
        ("write_behind_versions", 0, "--deltamem-write-behind-versions: .*greater than or equal to 1"),
        ("host_bytes", "1000", "--deltamem-host-bytes: .*greater than or equal to 1048576"),
        ("host_bytes", "much", "--deltamem-host-bytes: .*given: 'much'"),
        ("ttl", 0.5, "--deltamem-ttl: .*1 second at least.*given: 0.5"),
        ("ttl", -1, "--deltamem-ttl: .*greater than or equal to 0"),
        ("ttl", "nan", "--deltamem-ttl"),
        ("kernel", "fast", "--deltamem-kernel: .*'auto', 'native', 'triton' or 'torch'.*given: 'fast'"),
        ("session_header", "", "--deltamem-session-header"),
        ("session_header", "X Session", "--deltamem-session-header: .*no HTTP header name"),
        ("session_header", "X-Session-ID\n", "--deltamem-session-header"),
        ("session_header", "X-Sitzung-ü", "--deltamem-session-header"),
        ("session_header", "x" * 65, "--deltamem-session-header"),
    ],
)
def test_a_wrong_value_names_the_flag_and_the_value(
    name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve({"adapter": "a", "store": "memory://", name: value})
    monkeypatch.setenv(f"DELTAMEM_{name.upper()}", str(value))
    with pytest.raises(ConfigError, match=f"--deltamem-{name.replace('_', '-')}"):
        resolve({"adapter": "a", "store": "memory://"})


def test_the_secret_travels_in_a_private_file_and_not_in_the_settings(tmp_path: Path) -> None:
    plain = resolve({"adapter": "a", "store": "memory://"})
    one, other = plain.with_control(), plain.with_control()
    assert len(one.secret()) >= 32
    assert one.secret() == Settings(**one.model_dump()).secret(), "every process must find the same one"
    assert one.secret() != other.secret()
    assert one.secret().hex() not in str(one.model_dump())
    assert [stat.S_IMODE(p.stat().st_mode) for p in (Path(one.control), Path(one.control) / "secret")] == [0o700, 0o600]
    given = tmp_path / "secret"
    given.write_bytes(bytes(range(64)))
    given.chmod(0o600)
    assert plain.model_copy(update={"secret_file": str(given)}).with_control().secret() == bytes(range(64))


def test_a_secret_file_that_is_no_secret(tmp_path: Path) -> None:
    def start() -> str:
        with pytest.raises(ConfigError) as e:
            resolve({"adapter": "a", "store": "memory://", "secret_file": str(tmp_path / "s")}).with_control()
        return str(e.value)

    assert "cannot be read: No such file" in start()
    (tmp_path / "s").write_bytes(b"x" * 31)
    (tmp_path / "s").chmod(0o640)
    assert "has 31 bytes; it needs 32 random ones or more" in start()
    (tmp_path / "s").chmod(0o602)
    assert "can be written by anyone: chmod 600" in start()


def test_settings_are_frozen() -> None:
    settings = resolve({"adapter": "a", "store": "memory://"})
    with pytest.raises(ValueError, match="frozen"):
        settings.queue_depth = 1  # type: ignore[misc]


def test_settings_travel_in_the_connectors_config() -> None:
    settings = resolve({"adapter": "a", "store": "memory://", "queue_depth": 4})
    ours = {"kv_connector": CONNECTOR, "kv_connector_extra_config": {PLUGIN: settings.model_dump()}}
    assert settings_of(SimpleNamespace(kv_transfer_config=SimpleNamespace(**ours))) == settings
    theirs = {"kv_connector": "ExampleConnector", "kv_connector_extra_config": {"x": 1}}
    multi = SimpleNamespace(
        kv_connector="MultiConnector", kv_connector_extra_config={"connectors": [theirs, {"kv_role": "kv_both"}, ours]}
    )
    assert settings_of(SimpleNamespace(kv_transfer_config=multi)) == settings
    assert settings_of(SimpleNamespace(kv_transfer_config=SimpleNamespace(**theirs))) is None
    assert settings_of(SimpleNamespace(kv_transfer_config=None)) is None
    assert settings_of(SimpleNamespace()) is None


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        Settings(adapter="a", store="memory://", colour="blue")  # type: ignore[call-arg]
