"""`deltamem adapter …`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltamem_vllm.errors import AdapterError

app = typer.Typer(no_args_is_help=True, help="Look at δ-mem adapters and convert them.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder with delta_mem_config.json.")]


@app.command()
def inspect(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False
) -> None:
    """Say what an adapter is, what it costs per session, and whether it can be served."""
    from deltamem_vllm.adapter.inspect import inspect_adapter

    try:
        description = inspect_adapter(folder)
    except AdapterError as error:
        raise _fail(error) from error
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    for key, value in description.items():
        typer.echo(f"{key.replace('_', ' '):<24} {_readable(key, value)}")


@app.command()
def convert(
    folder: Folder,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write delta_mem_adapter.safetensors beside delta_mem_adapter.pt."""
    from deltamem_vllm.adapter.convert import convert_adapter

    try:
        path = convert_adapter(folder, overwrite=overwrite)
    except AdapterError as error:
        raise _fail(error) from error
    typer.echo(f"wrote {path}")


def _readable(key: str, value: object) -> str:
    if key == "layers" and isinstance(value, list):
        whole = value == list(range(len(value)))
        return f"{len(value)} (0 to {len(value) - 1})" if whole else ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _fail(error: AdapterError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
