"""``docs/api.md``: its commands run."""

import os
import re
import subprocess
from pathlib import Path

from deltamem_vllm.demo.server import VllmServer
from tests.server.talk import API_KEY, Talk

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


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
