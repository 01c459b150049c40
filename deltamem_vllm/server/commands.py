"""`deltamem keys …`: makes, lists and revokes the keys of a key file. A running server notices within two seconds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.server.tenants import KeyFile, digest_of, read_key_file

app = typer.Typer(no_args_is_help=True, help="API keys of tenants, for --deltamem-key-file.")

Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="1 to 64 of A-Z a-z 0-9 . _ -")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The key file.")]


@app.command()
def new(tenant: Tenant, file: File) -> None:
    """Make a key, print it once, and keep its digest. Makes the tenant, and the file, where there is none."""
    key = f"dm-{secrets.token_urlsafe(32)}"
    with _changing(file) as content:
        entry = content["tenants"].setdefault(tenant, {})
        entry.setdefault("keys", []).append(digest_of(key))
    typer.echo(key)
    typer.echo(f"this is the only time it is shown; {file} keeps its digest {digest_of(key)[:15]}…", err=True)


@app.command("list")
def list_keys(file: File) -> None:
    """Show tenants, the beginnings of their keys' digests, and quotas."""
    try:
        found = read_key_file(file)
    except ConfigError as error:
        raise _fail(error) from error
    for name, entry in sorted(found.tenants.items()):
        quotas = entry.model_dump(exclude={"keys"}, exclude_none=True)
        shown = [f"{key[:15]}…" for key in entry.keys] or ["no key"]
        typer.echo("  ".join([name, *shown, *(f"{quota}={value:,}" for quota, value in quotas.items())]))


@app.command()
def revoke(
    tenant: Tenant,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The beginning of the key's digest, as listed.")],
    file: File,
) -> None:
    """Take a key from a tenant. Its sessions stay, also without any key."""
    wanted = "sha256:" + digest.rstrip("…").removeprefix("sha256:")
    with _changing(file) as content:
        keys = content["tenants"].get(tenant, {}).get("keys", [])
        found = [key for key in keys if key.startswith(wanted)]
        if len(found) != 1:
            raise ConfigError(f"{len(found)} keys of tenant {tenant!r} begin with {wanted}: see deltamem keys list")
        keys.remove(found[0])
    typer.echo(f"revoked {found[0][:15]}… of {tenant}")


@contextlib.contextmanager
def _changing(file: Path) -> Iterator[dict[str, Any]]:
    """The file's content; what the block makes of it takes its place in one step. One change at a time."""
    try:
        with _locked(file.absolute().parent):
            there = file.exists()
            content = read_key_file(file).model_dump(exclude_none=True) if there else {"tenants": {}}
            yield content
            KeyFile.model_validate(content)
            _replace(file, json.dumps(content, indent=2) + "\n", file.stat() if there else None)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        raise _fail(ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from None
    except (ConfigError, OSError) as error:
        raise _fail(error) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(file: Path, text: str, before: os.stat_result | None) -> None:
    handle, name = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        if before is not None:  # a server that runs as another user must still be able to read it
            Path(name).chmod(before.st_mode & 0o777)
            with contextlib.suppress(PermissionError):
                os.chown(name, before.st_uid, before.st_gid)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
