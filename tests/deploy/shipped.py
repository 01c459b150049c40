"""What deploy/ ships, as the tests look at it."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("single", "replicas")
TOOLS = Path(sys.executable).parent
"""The environment's own commands."""


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of the environment's commands; nothing is raised."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, timeout=120)


def program(*names: str, remedy: str) -> str:
    """Path of the machine's own program; fails with the remedy, because a skipped check would hide a broken file."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise RuntimeError(f"{' or '.join(names)} is not installed: {remedy}")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    """All documents of a YAML file."""
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


@cache
def rendered(overlay: str) -> str:
    """An overlay as kubectl would apply it."""
    kubectl = program("kubectl", "kustomize", remedy="install kubectl 1.27 or kustomize 5 or newer")
    command = [kubectl, "kustomize"] if Path(kubectl).name == "kubectl" else [kubectl, "build"]
    done = subprocess.run(
        [*command, DEPLOY / "kustomize" / "overlays" / overlay], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return done.stdout


def resources(overlay: str) -> dict[tuple[str, str], Any]:
    """Its resources by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(rendered(overlay)) if each}


def compose() -> dict[str, Any]:
    """The compose file."""
    [found] = documents(DEPLOY / "compose" / "compose.yaml")
    return found


def unit(name: str) -> dict[str, list[str]]:
    """A systemd unit's settings; each may be given more than once."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "[")):
            found.setdefault(key, []).append(value)
    return found


def commands() -> dict[str, list[str]]:
    """``vllm serve``'s arguments in every deployment."""
    [values] = documents(DEPLOY / "production-stack" / "values.yaml")
    [model] = values["servingEngineSpec"]["modelSpec"]
    [start] = unit("deltamem.service")["ExecStart"]
    found = {
        "compose": list(compose()["services"]["server"]["command"]),
        "systemd": start.split()[2:],
        "production-stack": [model["modelURL"], "--host=0.0.0.0", *model["vllmConfig"]["extraArgs"]],
    }
    for overlay in OVERLAYS:
        pod = resources(overlay)["Deployment", "deltamem"]["spec"]["template"]["spec"]
        found[f"kustomize {overlay}"] = list(pod["containers"][0]["args"])
    return found


def seconds(text: str) -> int:
    """``75s`` or ``75`` as a number."""
    match = re.fullmatch(r"(\d+)s?", str(text))
    assert match is not None, text
    return int(match.group(1))


def flag(arguments: list[str], name: str) -> str:
    """A flag's value, as ``--flag=value`` or ``--flag value``."""
    for position, each in enumerate(arguments):
        if each.startswith(f"{name}="):
            return each.partition("=")[2]
        if each == name:
            return arguments[position + 1]
    raise AssertionError(f"{name} is not among {json.dumps(arguments)}")
