"""``vllm serve`` with our flags: what is accepted, what is refused before anything starts, and in which words.

Most of it goes through vLLM's own parser and configuration in this process, which is what ``vllm serve`` does before it
starts an engine; some of it through the command itself.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

import deltamem_vllm
from deltamem_vllm.config import CONNECTOR, settings_of
from deltamem_vllm.demo.server import environment, vllm_command
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.memory.preflight import code_fingerprint
from deltamem_vllm.plugin import _FLAGS, register
from tests.server.conftest import ADAPTER, HERE, MODEL

LOOPBACK = ["--host", "127.0.0.1"]
SMALL = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--enforce-eager"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("DELTAMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that what the parser sets is undone
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def parse(*arguments: str, model: Path = MODEL) -> Any:
    """``vllm serve MODEL arguments`` up to the parsed arguments."""
    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser.parse_args(["serve", str(model), *arguments])


def configure(*arguments: str, model: Path = MODEL) -> Any:
    """The same up to vLLM's configuration, after which the engine would start."""
    parsed = parse(*arguments, model=model)
    parsed.model = parsed.model_tag  # as ServeSubcommand.cmd does
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config()


def plugin(*arguments: str, adapter: Path = ADAPTER, store: str = "memory://") -> list[str]:
    return [
        "--plugin",
        "deltamem",
        "--deltamem-adapter",
        str(adapter),
        "--deltamem-store",
        store,
        *LOOPBACK,
        *arguments,
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``vllm serve`` says before it exits with 2."""
    with pytest.raises(SystemExit) as e:
        parse(*arguments)
    assert e.value.code == 2
    return capsys.readouterr().err


# --- accepted ---------------------------------------------------------------------------------------------------------


def test_flags_become_settings_in_every_spelling() -> None:
    for spelled in (
        ["--deltamem-queue-depth", "3", "--deltamem-session-header", "X-Chat"],
        ["--deltamem-queue-depth=3", "--deltamem-session-header=X-Chat"],
        ["--deltamem_queue_depth", "3", "--deltamem_session_header", "X-Chat"],
    ):
        settings = settings_of(parse(*plugin(*spelled)))
        assert settings is not None
        assert (settings.queue_depth, settings.session_header) == (3, "X-Chat")
        assert Path(settings.control).is_dir()


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ([], 0),
        (["--deltamem-durability", "sync"], 0),
        (["--deltamem-durability", "write-behind"], 15),
        (["--deltamem-durability", "write-behind", "--shutdown-timeout", "40"], 40),
        (["--shutdown-timeout", "40"], 40),
    ],
)
def test_write_behind_gives_the_engine_time_to_save(options: list[str], seconds: int) -> None:
    assert parse(*plugin(*options)).shutdown_timeout == seconds


def test_a_yaml_file_is_a_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"plugin: deltamem\ndeltamem-adapter: {ADAPTER}\ndeltamem-store: memory://\ndeltamem-queue-depth: 5\n"
        "deltamem-queue-seconds: 2.5\n"
    )
    settings = settings_of(parse("--config", str(path), *LOOPBACK))
    assert settings is not None
    assert (settings.adapter, settings.queue_depth, settings.queue_seconds) == (str(ADAPTER), 5, 2.5)
    overridden = settings_of(parse("--config", str(path), *LOOPBACK, "--deltamem-queue-depth", "6"))
    assert overridden is not None
    assert overridden.queue_depth == 6


def test_the_environment_is_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_ADAPTER", str(ADAPTER))
    monkeypatch.setenv("DELTAMEM_STORE", "memory://")
    settings = settings_of(parse("--plugin", "deltamem", *LOOPBACK))
    assert settings is not None
    assert (settings.adapter, settings.store) == (str(ADAPTER), "memory://")


def test_a_good_configuration_passes() -> None:
    config = configure(*SMALL, *plugin())
    assert config.kv_transfer_config.kv_connector == CONNECTOR
    assert len(config.additional_config["deltamem"]["adapter"]) >= 32
    assert config.additional_config["deltamem"]["code"] == code_fingerprint()
    assert "deltamem" in os.environ["VLLM_PLUGINS"].split(",")


def test_what_another_version_has_compiled_is_not_found(tmp_path: Path) -> None:
    """vLLM names a kept graph after this, among others."""
    package = Path(deltamem_vllm.__file__).parent
    copy = tmp_path / "elsewhere"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    before = code_fingerprint(copy)
    assert before == code_fingerprint(package), "where it is installed makes no difference"
    for name in ("compat.py", "memory/written.py", "ops/direct.py"):
        file = copy / name
        file.write_text(file.read_text() + "\n# another version\n")
        after = code_fingerprint(copy)
        assert after != before, name
        before = after


def test_without_the_plugin_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_ADAPTER", "/does/not/exist")  # an environment that is set for other servers
    config = configure(*SMALL)
    assert config.kv_transfer_config is None
    assert not config.additional_config
    assert "VLLM_PLUGINS" not in os.environ


def test_a_users_own_connector_is_kept() -> None:
    theirs = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"x": 1}}
    parsed = parse(*plugin("--kv-transfer-config", json.dumps(theirs)))
    assert parsed.kv_transfer_config.kv_connector == "MultiConnector"
    first, second = parsed.kv_transfer_config.kv_connector_extra_config["connectors"]
    assert first == theirs
    assert second["kv_connector"] == CONNECTOR
    assert settings_of(parsed) is not None


def test_a_users_allowlist_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "something,deltamem")
    parse(*plugin())
    assert os.environ["VLLM_PLUGINS"] == "something,deltamem"


# --- refused by the parser --------------------------------------------------------------------------------------------


def test_refusals_of_the_parser(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(capsys, "--plugin", "deltamem")
    assert "--deltamem-adapter DIR (or set DELTAMEM_ADAPTER)" in said
    said = refused(capsys, "--plugin", "deltemem")
    assert "--plugin deltemem: no installed vLLM plugin has that name; installed: " in said
    assert "deltamem" in said
    said = refused(capsys, "--deltamem-adapter", "x", "--deltamem-queue-depth", "3")
    assert "--deltamem-adapter, --deltamem-queue-depth without --plugin deltamem" in said
    assert "--deltamem-session-slots" in refused(capsys, *plugin("--deltamem-session-slots", "0"))
    assert "invalid int value: 'many'" in refused(capsys, *plugin("--deltamem-session-slots", "many"))
    assert "invalid choice: 'fast'" in refused(capsys, *plugin("--deltamem-kernel", "fast"))
    assert "no HTTP header name" in refused(capsys, *plugin("--deltamem-session-header", "X Chat"))
    assert "unrecognized arguments: --deltamem-colour" in refused(capsys, *plugin("--deltamem-colour", "blue"))
    assert "--grpc bypasses the HTTP layer" in refused(capsys, *plugin("--grpc"))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "unset it with --plugin deltamem" in refused(capsys, *plugin())
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND")
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    said = refused(capsys, *plugin())
    assert "VLLM_PLUGINS='something_else' leaves deltamem out" in said
    assert "add deltamem to it, or unset it" in said


# --- who may reach it -------------------------------------------------------------------------------------------------


def without_host(*arguments: str) -> list[str]:
    return [*(a for a in plugin() if a not in LOOPBACK), *arguments]


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "10.1.2.3", "a.b", "localhost.evil", "127.0.0.1.b"])
def test_without_a_key_only_loopback_is_served(host: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *without_host(*(["--host", host] if host else [])))
    for remedy in ("--api-key KEY", "--deltamem-key-file PATH", "--deltamem-open", "--host 127.0.0.1"):
        assert remedy in said
    assert (host if host else "all interfaces (no --host was given)") in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "127.0.0.1"],
        ["--host", "127.8.9.10"],
        ["--host", "::1"],
        ["--host", "localhost"],
        ["--uds", "/tmp/socket"],
        ["--deltamem-open"],
        ["--host", "0.0.0.0", "--api-key", "k"],
        ["--headless"],
    ],
    ids=lambda a: "-".join(a),
)
def test_where_a_server_starts(arguments: list[str]) -> None:
    assert settings_of(parse(*without_host(*arguments))) is not None


def test_the_environment_opens_a_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    parse(*without_host())
    monkeypatch.delenv("VLLM_API_KEY")
    monkeypatch.setenv("DELTAMEM_OPEN", "1")
    parse(*without_host())


def test_a_key_file_opens_a_server_if_it_is_good_and_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"tenants": {}}')
    settings = settings_of(parse(*without_host("--deltamem-key-file", str(path))))
    assert settings is not None
    assert settings.key_file == str(path)
    said = refused(capsys, *plugin("--deltamem-key-file", str(path), "--api-key", "k"))
    assert "--deltamem-key-file beside --api-key" in said
    assert "leave --api-key out" in said
    path.write_text("{")
    assert "is not the JSON of a key file" in refused(capsys, *plugin("--deltamem-key-file", str(path)))
    assert "No such file" in refused(capsys, *plugin("--deltamem-key-file", str(tmp_path / "other")))


def test_a_secret_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    (tmp_path / "secret").chmod(0o600)
    said = refused(capsys, *plugin("--deltamem-secret-file", str(tmp_path / "secret")))
    assert "has 5 bytes; it needs 32 random ones or more" in said


# --- refused before the engine starts ---------------------------------------------------------------------------------


def other_model(folder: Path, **changes: Any) -> Path:
    """The fixture's model with another configuration."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def other_adapter(folder: Path, **changes: Any) -> Path:
    """The fixture's adapter with another configuration."""
    shutil.copytree(ADAPTER, folder)
    path = folder / "delta_mem_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_an_adapter_for_another_model_names_both_sizes(tmp_path: Path) -> None:
    model = other_model(tmp_path / "model", hidden_size=96)
    with pytest.raises(ConfigError, match=r"\b64\b") as e:
        configure(*SMALL, *plugin(), model=model)
    assert "96" in str(e.value)


def test_an_unsupported_architecture(tmp_path: Path) -> None:
    model = other_model(tmp_path / "model", architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(ConfigError, match="is a LlamaForCausalLM; δ-mem serves Qwen3ForCausalLM, SmolLM3ForCausalLM"):
        configure(*SMALL, *plugin(), model=model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--enable-lora"], "--enable-lora cannot be combined with --plugin deltamem"),
        (["--block-size", "24"], "block.size"),
        (["--deltamem-store", "postgresql://127.0.0.1:1/db"], "cannot be reached"),
        (["--deltamem-store", "sqlite://relative.db"], "names no file; use sqlite:////absolute/path.db"),
        (["--deltamem-store", "/a/path"], "is not a URL"),
        (["--deltamem-store", "sqlite:////proc/no/such/folder/s.db"], "/proc/no/such/folder/s.db"),
        (["--deltamem-adapter", "/does/not/exist"], "/does/not/exist"),
    ],
    ids=lambda x: "-".join(x)[:40] if isinstance(x, list) else "",
)
def test_refusals_of_the_configuration(arguments: list[str], words: str) -> None:
    with pytest.raises(Exception, match=words):
        configure(*SMALL, *plugin(*arguments))


@pytest.mark.parametrize("granularity", ["message_mean", "sentence_mean"])
def test_an_adapter_that_is_not_served_yet(tmp_path: Path, granularity: str) -> None:
    adapter = other_adapter(tmp_path / "adapter", memory_write_granularity=granularity)
    with pytest.raises(ConfigError, match=f"'{granularity}'.* is not served yet; token granularity only"):
        configure(*SMALL, *plugin(adapter=adapter))


# --- the command itself -----------------------------------------------------------------------------------------------


def vllm(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [vllm_command(), "serve", *arguments]
    whole = {**environment(), **HERE, **env}
    return subprocess.run(command, env=whole, capture_output=True, text=True, timeout=200, check=False)


def test_help_lists_our_flags() -> None:
    done = vllm("--help=DeltaMem")
    assert done.returncode == 0, done.stderr[-1000:]
    for name in _FLAGS:
        assert f"--deltamem-{name}" in done.stdout
    assert "DELTAMEM_<NAME>" in done.stdout


def test_a_refusal_ends_the_command_with_the_reason_and_no_engine(tmp_path: Path) -> None:
    done = vllm(str(other_model(tmp_path / "model", hidden_size=96)), *SMALL, *plugin())
    assert done.returncode not in (0, -9)
    assert "ConfigError" in done.stderr or "AdapterError" in done.stderr
    assert "96" in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


def test_an_allowlist_without_us_hides_the_flags() -> None:
    """vLLM then does not load us, so that nothing of ours can explain it; the documentation must."""
    done = vllm(str(MODEL), *plugin(), VLLM_PLUGINS="something_else")
    assert done.returncode == 2
    assert "unrecognized arguments: --plugin deltamem" in done.stderr
