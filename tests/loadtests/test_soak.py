"""A soak sees what grows, and asks a server without a memory for nothing that only a memory has."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from loadtests.chaos.clients import Door
from loadtests.chaos.cluster import Cluster
from loadtests.chaos.ledger import Ledger
from loadtests.chaos.soak import Report, Sample, Size, campaign

SIZE = Size(seconds=100.0, warm=40.0)


def report(mib_per_second: float, descriptors: float = 0.0, until: float = 100.0) -> Report:
    """Samples that jump to and fro, and grow from the warm-up's end on."""
    grown = [(at, max(0.0, min(at, until) - SIZE.warm)) for at in range(100)]
    samples = [
        Sample(at, 1000 + at % 7 + mib_per_second * after, 100 + int(descriptors * after), 10 * at)
        for at, after in grown
    ]
    return Report(SIZE, samples)


def test_what_grows_only_in_the_warm_up_is_flat() -> None:
    warm = [Sample(at, 500.0 + min(at, 40) * 10, 100, at) for at in range(100)]
    assert Report(SIZE, warm).flat
    assert report(0.0).flat


@pytest.mark.parametrize("grows", [report(0.3), report(1.0, until=70), report(0.0, descriptors=0.1)])
def test_what_grows_afterwards_is_not(grows: Report) -> None:
    assert not grows.flat


@pytest.mark.parametrize("alone", [False, True])
def test_a_server_alone_is_asked_for_completions_only(alone: bool) -> None:
    asked: list[tuple[str, str, bool]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.method, request.path.split("/")[2], "X-Session-ID" in request.headers))
        await asyncio.sleep(0.01)
        return web.json_response({})

    async def scenario() -> Report:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        server: Any = SimpleNamespace(pid=os.getpgid(0))
        try:
            async with aiohttp.ClientSession() as http:
                door = Door(http, [f"http://127.0.0.1:{port}"], Ledger())
                return await campaign(Cluster([server], door, ""), Size(seconds=1.5, warm=0.0, workers=2, alone=alone))
        finally:
            await runner.cleanup()

    found = asyncio.run(scenario())
    assert found.samples[-1].rss > 0
    kinds = {("POST", "completions", not alone)}
    assert set(asked) == (kinds if alone else kinds | {("GET", "sessions", False), ("DELETE", "sessions", False)})
    assert found.rows()["server"] == ("vLLM alone" if alone else "vLLM with a memory")
