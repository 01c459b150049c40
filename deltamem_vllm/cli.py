"""The `deltamem` command: everything that works offline. Each group lives with what it is about."""

from __future__ import annotations

import typer

from deltamem_vllm.adapter import commands as adapter
from deltamem_vllm.audit import commands as audit
from deltamem_vllm.report.commands import report
from deltamem_vllm.server import commands as keys
from deltamem_vllm.sizing import size
from deltamem_vllm.store import commands as store

app = typer.Typer(no_args_is_help=True, add_completion=False, help="δ-mem for vLLM: offline tools.")
app.add_typer(adapter.app, name="adapter")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.add_typer(store.app, name="store")
app.command()(report)
app.command()(size)


@app.callback()
def main() -> None:
    """δ-mem for vLLM: offline tools."""


if __name__ == "__main__":
    app()
