"""A newcomer's path: the commands of README, quickstart and production checklist, in their order, on one server.

A block that is not run says so in a comment before it, with the reason. `make serve` itself starts the server.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from deltamem_vllm.config import settings_of
from deltamem_vllm.demo.server import free_port
from deltamem_vllm.plugin import register
from tests.docs.reading import PRESENT, ROOT, Fence, fences

WALKED = ("README.md", "docs/quickstart.md", "docs/production.md")
RUN = ("bash", "console", "python")
REASONS = ("not run: ", "parsed: ")
BACKGROUND = "runs in the background"
BLOCKS = [(document, fence) for document in WALKED for fence in fences(PRESENT[document])]


def is_run(fence: Fence) -> bool:
    """Whether the walk executes a block."""
    return fence.language in RUN and not fence.mark


def test_every_block_runs_or_says_why_not() -> None:
    for document, fence in BLOCKS:
        assert fence.language, f"{document}: a block without a language:\n{fence.code}"
        commands = re.search(r"^(make|curl|deltamem|vllm|pip|python\S*) ", fence.code, re.MULTILINE)
        assert fence.language in RUN or not commands or fence.code.startswith("vllm serve MODEL "), fence.code
        assert not fence.mark or fence.mark == BACKGROUND or fence.mark.startswith(REASONS), fence.mark
        assert all(len(fence.mark) > len(reason) + 20 for reason in REASONS if fence.mark.startswith(reason))
    assert sum(is_run(fence) for _, fence in BLOCKS) >= 8
    assert [fence.code for _, fence in BLOCKS if fence.mark == BACKGROUND] == ["make serve\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the newcomer stands: the bundled model is there under its path in the checkout."""
    made = tmp_path_factory.mktemp("walk")
    (made / "deltamem_vllm").mkdir()
    (made / "deltamem_vllm" / "recall").symlink_to(ROOT / "deltamem_vllm" / "recall")
    (made / ".curlrc").write_text("fail\nsilent\nshow-error\n")
    return made


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    """That of a person who has activated the environment: a home of its own, and no settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DELTAMEM_", "VLLM_PLUGINS"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"PATH": path, "XDG_DATA_HOME": str(folder / "data"), "CURL_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return {**kept, **ours}


@pytest.fixture(scope="module")
def port(folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """Of what `make serve` leaves running; the environment it would set up first is the one we are in."""
    number = free_port()
    command = ["make", "-o", "venv", "serve", f"VENV={sys.prefix}", f"PORT={number}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        end = time.monotonic() + 150
        while not answers(number):
            text = (folder / "log").read_text(errors="replace")[-3000:]
            assert process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.25)
        yield number
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    """Whether a server is ready there."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    return False


def test_the_path_from_readme_to_production_can_be_walked(
    folder: Path, environment: dict[str, str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One shell for all of them, because later blocks use variables of earlier ones. `vllm` only notes its arguments.
    script = ["set -euo pipefail", "vllm() { printf '%s\\0' \"$@\" > arguments; }"]
    for number, (_, fence) in enumerate(BLOCKS):
        if fence.language == "python" and is_run(fence):
            (folder / f"block{number}.py").write_text(fence.code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
            script += [f"echo; echo '=== {number}'", f"python block{number}.py"]
        elif is_run(fence) or fence.mark.startswith("parsed: "):
            script += [f"echo; echo '=== {number}'", fence.code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + (folder / "log").read_text()[-2000:]
    said = {int(part.split()[0]): part for part in re.split(r"^=== ", done.stdout, flags=re.MULTILINE)[1:]}
    shown = {BLOCKS[number][1].code: text for number, text in said.items()}

    told, asked = (text for block, text in shown.items() if "curl -i" in block)
    assert re.search(r"x-session-version: 1\r?$", told, re.IGNORECASE | re.MULTILINE), told
    assert re.search(r"x-deltamem-commit: committed\r?$", told, re.IGNORECASE | re.MULTILINE), told
    assert "clara" in asked.lower(), "the memory is what the quickstart shows"
    [python] = [text for block, text in shown.items() if "from openai" in block]
    assert "clara" in python.lower()
    [inspected] = [text for block, text in shown.items() if "adapter inspect" in block]
    assert re.search(r"^servable +yes$", inspected, re.MULTILINE)
    [asked_of_a_server] = [text for block, text in shown.items() if "store check" in block]
    assert re.search(r"deltamem_up\{.*\} 1", asked_of_a_server)
    assert "nothing damaged" in asked_of_a_server

    arguments = (folder / "arguments").read_bytes().decode().split("\0")[:-1]
    monkeypatch.chdir(folder)
    for name in [each for each in os.environ if each.startswith(("DELTAMEM_", "VLLM_API_KEY"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that what the parser sets is undone
    monkeypatch.delenv("VLLM_PLUGINS")
    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    settings = settings_of(parser.parse_args(arguments))
    assert settings is not None
    shutil.rmtree(settings.control)
    assert Path(settings.key_file).parent == folder
