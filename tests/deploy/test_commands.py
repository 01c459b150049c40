"""The server's command in every deployment, through vLLM's own parser; the systemd units, through systemd's."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from deltamem_vllm.config import settings_of
from deltamem_vllm.plugin import register
from deltamem_vllm.server.tenants import digest_of
from tests.deploy.shipped import DEPLOY, commands, program, unit

UNITS = sorted(path.name for path in (DEPLOY / "systemd").glob("deltamem*.*") if path.suffix in (".service", ".timer"))


@pytest.mark.parametrize("name", [*commands()])
def test_a_deployments_command_is_understood(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in [n for n in os.environ if n.startswith("DELTAMEM_") or n == "VLLM_API_KEY"]:
        monkeypatch.delenv(each)
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that what the parser sets is undone
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setenv("DELTAMEM_STORE", "memory://")  # where the command has none
    if name == "production-stack":
        monkeypatch.setenv("VLLM_API_KEY", "the chart's servingEngineSpec.vllmApiKey")
    (tmp_path / "keys.json").write_text(json.dumps({"tenants": {"acme": {"keys": [digest_of("a-key")]}}}))
    (tmp_path / "secret").write_bytes(bytes(32))
    for each in tmp_path.iterdir():
        each.chmod(0o600)
    arguments = [each.replace("/etc/deltamem", str(tmp_path)) for each in commands()[name]]
    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(["serve", *arguments])
    settings = settings_of(parsed)
    assert settings is not None
    shutil.rmtree(settings.control)
    assert parsed.shutdown_timeout > 0
    assert settings.adapter.endswith("adapter") or name == "systemd"
    assert settings.secret_file
    assert parsed.host == "0.0.0.0"
    assert not settings.open, "nobody is served without a key"
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", *arguments, "--shutdown-timeuot=1"])


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    analyze = program("systemd-analyze", remedy="Debian: apt-get install systemd")
    for each in UNITS:
        text = (DEPLOY / "systemd" / each).read_text(encoding="utf-8")
        # What the unit would start is installed elsewhere; whether it could be started is the tests' of those commands.
        text = text.replace("/opt/deltamem/bin/vllm", "/bin/true").replace("/opt/deltamem/share/deltamem", "/usr/bin")
        (tmp_path / each).write_text(text.replace("/usr/bin/backup.sh", "/bin/true"))
    done = subprocess.run([analyze, "verify", tmp_path / name], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if str(tmp_path / name) in line or name in line]
    assert done.returncode == 0, done.stderr
    assert said == []
    planted = tmp_path / f"planted-{name}"
    planted.write_text((tmp_path / name).read_text().replace("[Unit]", "[Unit]\nAfterwards=network.target"))
    done = subprocess.run([analyze, "verify", planted], capture_output=True, text=True)
    assert "Afterwards" in done.stderr


def test_the_server_is_sandboxed() -> None:
    analyze = program("systemd-analyze", remedy="Debian: apt-get install systemd")
    path = DEPLOY / "systemd" / "deltamem.service"
    command = [analyze, "security", "--offline=true", "--threshold=30", path]  # exposure 3.0 of 10; unsandboxed: 9.6
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:]
    assert unit("deltamem.service")["KillMode"] == ["mixed"], "a signal to all would end the engine before its requests"
