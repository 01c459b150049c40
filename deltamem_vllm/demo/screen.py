"""How the demo looks: headings, a line that counts seconds while one waits, tables of turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltamem_vllm.demo.script import Row, says
from deltamem_vllm.demo.server import VllmServer

_REPORT_EVERY = 10.0


class Screen:
    """Writes to a terminal, or plain lines to a file or a pipe.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        """Head the next part."""
        self.console.print()
        self.console.rule(f"[bold]{escape(text)}", align="left")

    def say(self, text: str) -> None:
        """One paragraph; rich markup allowed."""
        self.console.print(text, highlight=False)

    def plain(self, text: str) -> None:
        """Text exactly as it is: a command to copy."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def fail(self, text: str) -> None:
        """What went wrong."""
        self.console.print(f"[bold red]failed:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def wait_for(self, server: VllmServer, what: str) -> None:
        """Count the seconds until the server is ready."""
        reported = 0.0
        with self._status(what) as update:

            def waiting(seconds: float) -> None:
                nonlocal reported
                update(f"{what} … {seconds:.0f} s")
                if not self.console.is_terminal and seconds - reported >= _REPORT_EVERY:
                    reported = seconds
                    self.say(f"{what} … {seconds:.0f} s")

            seconds = server.wait_ready(waiting=waiting)
        self.say(f"{what}: ready after {seconds:.1f} s at {server.base_url}")

    def turns(self, rows: Sequence[Row]) -> None:
        """A table of turns; right answers are green."""
        compares = any(row.without is not None for row in rows)
        table = Table(show_lines=False, pad_edge=False)
        table.add_column("sent")
        table.add_column("prompt\ntokens", justify="right")
        if compares:
            table.add_column("without memory")
        table.add_column("with memory" if compares else "answer")
        table.add_column("session\nversion", justify="right")
        table.add_column("memory\nbytes", justify="right")
        for row in rows:
            answers = [row.without, row.remembering] if compares else [row.remembering]
            cells = []
            for reply in answers:
                right = reply is not None and row.expected is not None and says(reply, row.expected)
                text = escape(reply.text) if reply is not None else ""
                cells.append(f"[bold green]{text}[/]" if right else f"[dim]{text}[/]" if row.expected else text)
            table.add_row(
                escape(row.sent),
                str(row.remembering.prompt_tokens),
                *cells,
                str(row.info["version"]) if row.info else "–",
                f"{row.info['state_bytes']:,}" if row.info else "–",
            )
        self.console.print(table)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @contextmanager
    def _status(self, what: str) -> Iterator[Callable[[str], None]]:
        if not self.console.is_terminal:
            yield lambda text: None
            return
        with self.console.status(escape(what)) as status:
            yield lambda text: status.update(escape(text))
