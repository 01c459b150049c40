"""Requests that are under way while a test does something else."""

import random
import threading
from dataclasses import dataclass, field

import httpx

from tests.server.slow import PACE
from tests.server.talk import Talk, closing


def prompt(seed: int, size: int = 24) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(250) for _ in range(size)]


@dataclass
class Stream(threading.Thread):
    """A streamed completion, slow enough to be met, whose client reads on in a thread of its own.

    Attributes:
        begun: the first token is here: the session is being written.
        text: everything that was received.
    """

    talk: Talk
    tokens: list[int]
    session: str
    n: int
    pace: dict[str, float] = field(default_factory=lambda: PACE)
    begun: threading.Event = field(default_factory=threading.Event)
    text: str = ""
    status: int = 0

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        try:
            with self.talk.streamed(self.tokens, self.session, n=self.n, vllm_xargs=self.pace) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    self.text += f"{line}\n"
                    if line.startswith("data: {"):
                        self.begun.set()
        except httpx.TransportError:
            pass  # its server was killed

    def start_writing(self) -> "Stream":
        """Start, and return when the first token has come."""
        self.start()
        assert self.begun.wait(60), f"{self.status} {self.text[:500]}"
        return self

    def finish(self) -> dict[str, str]:
        """What the stream's end says of the session."""
        self.join(120)
        assert not self.is_alive()
        assert self.status == 200, self.text[:500]
        return closing(self.text)
