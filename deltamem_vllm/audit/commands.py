"""`deltamem audit …`: check an audit log, and find a session in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltamem_vllm.audit.chain import verify as verify_chain
from deltamem_vllm.audit.log import KEY_BYTES
from deltamem_vllm.audit.log import label as label_of

app = typer.Typer(no_args_is_help=True, help="Check an audit log, and find a session in it.")

Log = Annotated[
    Path, typer.Argument(metavar="PATH", help="As given to --deltamem-audit; PATH.1 for the second engine.")
]


@app.command()
def verify(
    path: Log,
    head: Annotated[str | None, typer.Option(metavar="HASH", help="A hash that the chain must have reached.")] = None,
) -> None:
    """Find entries that were edited, removed, inserted or moved. Exit code 1 if there are any.

    Entries cut off at the end leave a chain that is whole: keep its head somewhere else and give it with --head. Who
    can write the file can also make a whole new chain; that too only a head kept elsewhere shows.
    """
    end, faults = verify_chain(path, head)
    for fault in faults:
        typer.echo(str(fault))
    typer.echo(f"{end.seq} entries, head {end.hash}: {len(faults) or 'nothing'} wrong")
    if faults:
        raise typer.Exit(1)


@app.command()
def label(
    path: Log,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="'default' where there is but one.")],
    session: Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")],
) -> None:
    """Say what a session is called in the log. Needs the log's key, PATH.key."""
    file = path.with_name(path.name + ".key")
    try:
        key = file.read_bytes()
    except OSError as error:
        typer.echo(f"error: {file}: {error.strerror}", err=True)
        raise typer.Exit(2) from error
    if len(key) != KEY_BYTES:
        typer.echo(f"error: {file} does not have {KEY_BYTES} bytes", err=True)
        raise typer.Exit(2)
    typer.echo(label_of(key, tenant, session))
