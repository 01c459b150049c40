"""``docs/api.md``: its commands run, and it names every route."""

import os
import re
import subprocess
from pathlib import Path

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.server.routes import make_router
from tests.server.talk import API_KEY, Talk

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_route_is_named_and_no_other() -> None:
    routes = {f"{method} {route.path}" for route in make_router().routes for method in route.methods}  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `([A-Z]+ /v1/[^`]*)`", TEXT, re.MULTILINE)) == routes


def test_its_commands_run(talk: Talk, server: VllmServer, tmp_path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 6
    script = "\n".join(["set -euo pipefail", *blocks])
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "URL": server.base_url, "KEY": API_KEY},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    assert talk.version("alice") == 0
    assert talk.version("alice-2") == 1
