"""Reading ahead: every item in its order, however late it is asked for; errors at their place; closing closes."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from deltamem_vllm.server.ahead import read_ahead


class Source:
    """Gives numbers, then fails or waits for ever."""

    def __init__(self, count: int, end: str = "") -> None:
        self.count, self.end = count, end
        self.given, self.closed = 0, False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.count):
                self.given += 1
                yield number
                await asyncio.sleep(0)
            if self.end == "error":
                raise ValueError("at the end")
            if self.end == "wait":
                await asyncio.Event().wait()
        finally:
            self.closed = True


def test_all_is_taken_before_it_is_asked_for() -> None:
    async def scenario() -> None:
        source = Source(100)
        ahead = read_ahead(source.items())
        assert await anext(ahead) == 0
        for _ in range(300):
            await asyncio.sleep(0)
        assert (source.given, source.closed) == (100, True)
        assert [item async for item in ahead] == list(range(1, 100))

    asyncio.run(scenario())


def test_an_error_comes_behind_the_items_before_it() -> None:
    async def scenario() -> None:
        ahead = read_ahead(Source(3, "error").items())
        assert [await anext(ahead) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="at the end"):
            await anext(ahead)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_who_goes_closes_the_source(how: str) -> None:
    async def scenario() -> None:
        source = Source(2, "wait")
        ahead = read_ahead(source.items())
        assert [await anext(ahead), await anext(ahead)] == [0, 1]
        if how == "cancelled":
            waiting = asyncio.ensure_future(anext(ahead))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await ahead.aclose()
        assert source.closed
        assert len(asyncio.all_tasks()) == 1, "its reader still runs"

    asyncio.run(scenario())
