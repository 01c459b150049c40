"""What our hooks cost the engine's scheduling thread, per step and per request, with many sessions running.

    python -m loadtests.hooks [--running 64] [--steps 5000]

Real `SchedulerSide` and `SessionService` (memory store); vLLM's scheduler output is imitated, since its own cost is
not what is measured.
"""

import argparse
import secrets
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from vllm.v1.request import RequestStatus

from deltamem_vllm.sessions.control import BlockingControlClient, serve
from deltamem_vllm.sessions.grants import EXTRA
from deltamem_vllm.sessions.scheduler import SchedulerSide
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.sessions.steps import Answer
from loadtests.table import console

SHAPE = (36, 1, 8, 8)
PROMPT = 1024
BLOCK = 16


def output(new: list[Any], running: list[str]) -> Any:
    """As much of a scheduler output as a connector looks at."""
    cached = SimpleNamespace(req_ids=running, resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
    return SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=cached)


class Engine:
    """The scheduling thread's view of one engine.

    Args:
        folder: for its socket.
        slots: size of the session pool.
        options: further ones of `SessionService`.
    """

    def __init__(self, folder: str, slots: int = 1024, **options: Any) -> None:
        address = f"ipc://{folder}/engine"
        settings = {"store_url": "memory://", "queue_depth": 8, "queue_seconds": 30.0, "secret": bytes(32), **options}
        self.service = SessionService(layout="L36H1r8", adapter="a", model="m", state_shape=SHAPE, **settings)
        self.service.start(lambda service: serve(service, address))
        self.side = SchedulerSide(self.service, 0, BLOCK, SHAPE, slots=slots)
        self.client = BlockingControlClient(address)
        self.spent: dict[str, list[float]] = {
            "arrive": [],
            "first step": [],
            "decode step": [],
            "finish": [],
            "state": [],
        }

    def timed(self, what: str, work: Any, *args: Any) -> Any:
        """Run a hook and note its microseconds."""
        start = time.perf_counter()
        result = work(*args)
        self.spent[what].append((time.perf_counter() - start) * 1e6)
        return result

    def begin(self, session: int) -> Any:
        """A turn is admitted, arrives and is scheduled for the first time."""
        ticket, tokens = secrets.token_hex(16), np.random.default_rng().integers(0, 1000, PROMPT, dtype=np.int32)
        self.client.ask(
            "admit", ticket=ticket, tenant="t", session=f"s{session}", mode="readwrite", tokens=tokens.tobytes(),
            salt=None, held=False,
        )  # fmt: skip
        ids = [*tokens.tolist(), 1, 2]
        request = SimpleNamespace(
            request_id=ticket, sampling_params=SimpleNamespace(extra_args={EXTRA: {"ticket": ticket}}),
            all_token_ids=ids,
            num_tokens=len(ids), status=RequestStatus.FINISHED_STOPPED,
        )  # fmt: skip
        self.timed("arrive", self.side.arrive, request)
        new = SimpleNamespace(req_id=ticket, block_ids=([session],), num_computed_tokens=0)
        self.timed("first step", self.side.plan_step, output([new], []))
        return request

    def end(self, request: Any, state: NDArray[np.float32] | None = None) -> None:
        """The turn ends; its state comes back from the worker (None: a random one); the commit becomes durable."""
        self.timed("finish", self.side.finish, request, list(range(-(-request.num_tokens // BLOCK))))
        self.side.plan_step(output([], []))
        if state is None:
            state = np.random.default_rng().normal(size=SHAPE).astype(np.float32)
        answer = Answer({request.request_id: [(tuple(range(SHAPE[0])), state.tobytes())]})
        self.timed("state", self.side.receive, answer)
        result = self.client.ask("outcome", ticket=request.request_id)
        if result["status"] != "committed":
            raise SystemExit(f"a commit failed, nothing is reported: {result}")


def measure(running: int = 64, steps: int = 5000) -> list[dict[str, Any]]:
    """Start sessions, step, end them: a row per hook, microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(folder)
        for _ in range(4):
            requests = [engine.begin(session) for session in range(running)]
            scheduled = output([], [r.request_id for r in requests])
            for _ in range(steps // 4):
                engine.timed("decode step", engine.side.plan_step, scheduled)
            for request in requests:
                engine.end(request)
        engine.client.close()
        engine.service.close()
    return [
        {
            "hook": what,
            "times": len(values),
            "p50 µs": statistics.median(values),
            "p99 µs": statistics.quantiles(values, n=100)[98],
        }
        for what, values in engine.spent.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    table = Table("hook", "times", "p50 µs", "p99 µs")
    for row in measure(args.running, args.steps):
        table.add_row(row["hook"], str(row["times"]), f"{row['p50 µs']:.1f}", f"{row['p99 µs']:.1f}")
    screen = console()
    screen.print(
        f"{args.running} sessions running, prompts of {PROMPT} tokens, states of {int(np.prod(SHAPE)) * 4} bytes"
    )
    screen.print(table)


if __name__ == "__main__":
    main()
