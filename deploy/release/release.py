"""Builds what is published: ``python deploy/release/release.py FOLDER`` leaves a wheel, an sdist and sbom.json there.

Run by ``make release`` in the environment of the tests: it has the build tools and the torch whose headers are needed,
so nothing is fetched. The wheel is built from the sdist. The version is that of the newest tag; see pyproject.toml.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = (ROOT / "deploy" / "cpu" / "requirements.lock", ROOT / "deploy" / "docker" / "runtime.txt")
"""What runs beside the package. The rest of the environment builds and tests it."""


def normal(name: str) -> str:
    """A distribution's name as the index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(*files: Path) -> dict[str, str]:
    """Versions by name; a line is ``name==version``, a comment, or empty."""
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    found = [line.split("==", 1) for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in found}


def build(folder: Path) -> tuple[Path, Path]:
    """Build both into a folder; returns wheel and sdist.

    Raises:
        subprocess.CalledProcessError: the build failed; its output is on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", made]
        subprocess.run([*command, str(ROOT)], check=True, stdout=sys.stderr)
        [wheel], [sdist] = Path(made).glob("*.whl"), Path(made).glob("*.tar.gz")
        return wheel.replace(folder / wheel.name), sdist.replace(folder / sdist.name)


def bill_of_materials(version: str) -> dict[str, object]:
    """A CycloneDX document of the package at a version and of everything that is pinned to run beside it.

    Raises:
        RuntimeError: this environment lacks something of that.
    """
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    made = subprocess.run([*command, "--output-reproducible", "--of", "JSON"], check=True, capture_output=True)
    document = json.loads(made.stdout)
    wanted = pins(*PINNED)
    components = [each for each in document["components"] if normal(each["name"]) in wanted]
    missing = wanted.keys() - {normal(each["name"]) for each in components}
    if missing:
        raise RuntimeError(f"not installed in {sys.prefix}: {', '.join(sorted(missing))}; run make venv")
    root = document["metadata"]["component"]
    root["version"], root["purl"] = version, f"pkg:pypi/deltamem-vllm@{version}"
    kept = {each["bom-ref"] for each in components} | {root["bom-ref"]}
    document["components"] = components
    document["dependencies"] = [
        {**each, "dependsOn": [ref for ref in each["dependsOn"] if ref in kept]} if "dependsOn" in each else each
        for each in document["dependencies"]
        if each["ref"] in kept
    ]
    return dict(document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    wheel, sdist = build(folder)
    document = bill_of_materials(wheel.name.split("-")[1])
    (folder / "sbom.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    for path in (wheel, sdist, folder / "sbom.json"):
        sys.stdout.write(f"{path} ({path.stat().st_size:,} bytes)\n")


if __name__ == "__main__":
    main()
