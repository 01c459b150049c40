"""Many sessions in a short time, and whether the server's memory and descriptors stay where they are.

New sessions, turns of old ones, readers and deletions, as fast as the server answers. Its host memory for sessions and
its KV cache (whose pages become resident when a block is used for the first time) are so small that they are full
within the warm-up. A cache of oneDNN's, which fills for far longer, is switched off (see `ENVIRONMENT`). What grows
after that grows for ever. ``--alone`` sends the same completions to vLLM without a memory: what grows there as well is
not ours.
"""

import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_vllm.demo.server import group_members
from loadtests.chaos.clients import TIMEOUT
from loadtests.chaos.cluster import Cluster, serving, talking
from loadtests.chaos.scripts import Script

HOST, BLOCKS = "4MiB", "512"
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ENVIRONMENT = {CACHE: os.environ.get(CACHE, "0")}
"""oneDNN keeps up to 1,024 compiled products, one for each shape of a weight and number of tokens in a step; it grows
until every number has come. What vLLM's layers keep of them themselves stays on. The caller's own value is taken."""
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of it.

    Attributes:
        seconds: in all; the first ``warm`` of them are not looked at.
        grows: MiB and descriptors by which the fitted line may rise over the rest of the time.
        alone: vLLM without a memory; what only sessions have (readers, look-ups, deletions) is left out.
    """

    seconds: float = 600.0
    warm: float = 200.0
    workers: int = 8
    grows: tuple[float, float] = (16.0, 4.0)
    alone: bool = False


@dataclass(frozen=True)
class Sample:
    """The server's process group at a moment: seconds since the start, MiB resident, open descriptors, answers."""

    at: float
    rss: float
    descriptors: int
    answers: int


def measured(group: int, at: float, answers: int) -> Sample:
    """Look at a process group now."""
    pages = descriptors = 0
    for pid in group_members(group):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  a Path for each is waste
        except OSError:  # it ended meanwhile
            continue
    return Sample(at, pages * PAGE / 2**20, descriptors, answers)


def rise(samples: Sequence[Sample], what: str) -> float:
    """By how much the least-squares line through the samples rises from the first to the last."""
    xs, ys = [sample.at for sample in samples], [float(getattr(sample, what)) for sample in samples]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return slope * (xs[-1] - xs[0])


@dataclass
class Report:
    """What came of it."""

    size: Size
    samples: list[Sample]

    @property
    def after(self) -> list[Sample]:
        """Those after the warm-up."""
        return [sample for sample in self.samples if sample.at >= self.size.warm]

    @property
    def flat(self) -> bool:
        """Whether neither grows by more than it may."""
        return all(
            rise(self.after, what) <= most for what, most in zip(("rss", "descriptors"), self.size.grows, strict=True)
        )

    def rows(self) -> dict[str, Any]:
        """The figures, by what they are of."""
        first, last = self.after[0], self.after[-1]
        return {
            "server": "vLLM alone" if self.size.alone else "vLLM with a memory",
            "warm-up, then": f"{self.size.warm:g} s, {last.at - first.at:.0f} s",
            "requests, in the time after the warm-up": f"{last.answers - first.answers:,}",
            "resident memory, MiB, first and last": f"{first.rss:.1f}, {last.rss:.1f}",
            "rise of the line through it, MiB": f"{rise(self.after, 'rss'):+.1f} (at most {self.size.grows[0]:g})",
            "descriptors, first and last": f"{first.descriptors}, {last.descriptors}",
            "rise of the line through them": f"{rise(self.after, 'descriptors'):+.1f} (at most {self.size.grows[1]:g})",
        }


async def campaign(cluster: Cluster, size: Size) -> Report:
    """Keep a server busy, and look at it every second."""
    door, url = cluster.door, cluster.door.urls[0]
    group = cluster.servers[0].pid
    assert group is not None
    begun, answers, samples = time.monotonic(), 0, list[Sample]()

    async def ask(method: str, path: str, session: str, **more: Any) -> None:
        nonlocal answers
        ours = method == "POST" and not size.alone
        headers = {"X-Session-ID": session, **more.pop("headers", {})} if ours else {}
        async with door.http.request(method, f"{url}{path}", headers=headers, timeout=TIMEOUT, **more) as response:
            text = await response.text()
            if response.status not in (200, 404):
                raise RuntimeError(f"{method} {path}: {response.status} {text[:300]}")
        answers += 1

    async def work(worker: int) -> None:
        rng, number = random.Random(worker), 0
        while time.monotonic() < begun + size.seconds:
            session, script = f"soak-{worker}-{number}", Script(rng.randrange(8))
            number += 1
            for turn in range(1, rng.randint(1, 4) + 1):
                await ask("POST", "/v1/completions", session, json=script.body(turn, door.model))
            if size.alone:
                continue
            old = f"soak-{worker}-{rng.randrange(number)}"
            mode = {"X-DeltaMem-Mode": "read"}
            await ask("POST", "/v1/completions", old, json=script.body(1, door.model), headers=mode)
            await ask("GET", f"/v1/sessions/{old}", old)
            if rng.random() < 0.3:
                await ask("DELETE", f"/v1/sessions/{old}", old)

    async def look() -> None:
        while time.monotonic() < begun + size.seconds:
            samples.append(measured(group, time.monotonic() - begun, answers))
            await asyncio.sleep(1.0)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(look())
        for worker in range(size.workers):
            tasks.create_task(work(worker))
    return Report(size, samples)


def run(size: Size, folder: Path) -> Report:
    """The campaign on a server and a SQLite file of its own."""
    place = f"sqlite:///{folder}/sessions.db"

    async def inner() -> Report:
        async with talking(servers, place) as cluster:
            return await campaign(cluster, size)

    ours = () if size.alone else ("--deltamem-host-bytes", HOST)
    with serving([place], "--num-gpu-blocks-override", BLOCKS, *ours, env=ENVIRONMENT, alone=size.alone) as servers:
        return asyncio.run(inner())
