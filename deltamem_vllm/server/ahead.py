"""Reading an engine's outputs ahead of the client that takes them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TypeVar

_T = TypeVar("_T")


async def read_ahead(items: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
    """``items`` in their order, each taken as soon as it is there, whether or not anybody asks for it: until then it is
    kept. Raises at its place what ``items`` raises; closing this closes ``items``.
    """
    waiting: asyncio.Queue[tuple[_T, ...]] = asyncio.Queue()

    async def read() -> None:
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    waiting.put_nowait((item,))
        finally:
            waiting.put_nowait(())

    reader = asyncio.create_task(read())
    try:
        while found := await waiting.get():
            yield found[0]
        await reader
    finally:
        reader.cancel()
        await asyncio.wait({reader})
        if not reader.cancelled():
            reader.exception()  # it was raised above, or nobody is left to hear of it
