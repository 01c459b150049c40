"""`deltamem report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deltamem_vllm.errors import DeltaMemError


def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, as for vllm serve.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder with delta_mem_config.json.")],
    batches: Annotated[str, typer.Option(help="Requests at once, separated by commas.")] = "1,8",
    lengths: Annotated[str, typer.Option(help="Tokens of each prompt, separated by commas.")] = "128,512",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each request.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine; figures are medians.")] = 5,
    engine: Annotated[list[str] | None, typer.Option(metavar="NAME=JSON", help="An argument of vllm.LLM.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write report.json and report.md into this folder.")] = None,
) -> None:
    """Measure what a memory costs a model: bytes, parameters, TTFT, TPOT and tokens/s, with and without it."""
    from deltamem_vllm.report.run import report as run
    from deltamem_vllm.report.table import markdown

    try:
        options = _options(engine or [])
        sizes = [_numbers(name, text) for name, text in (("--batches", batches), ("--lengths", lengths))]
        found = run(
            model, adapter, sizes[0], sizes[1], tokens, rounds, options, lambda text: typer.echo(text, err=True)
        )
    except DeltaMemError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    table = markdown(found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (out / "report.md").write_text(table, encoding="utf-8")
    typer.echo(table)


def _options(given: list[str]) -> dict[str, Any]:
    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} is not NAME=JSON, as max_model_len=2048", param_hint="--engine")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[name.replace("-", "_")] = value  # a word needs no quotes
    return options


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers from 1 on, as 1,8", param_hint=name)
    return numbers
