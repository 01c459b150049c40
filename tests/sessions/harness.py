"""A real `SessionService` with a toy engine: the test plays API process and scheduler, the memory is arithmetic."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deltamem_vllm.sessions import service as service_module
from deltamem_vllm.sessions.control import serve
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.protocol import SessionKey, StateStore

SHAPE, LAYOUT = (2, 1, 2, 2), "L2H1r2"
ADAPTER, MODEL = "adapter-fingerprint", "model-fingerprint"
TENANT = "default"
SECRET = bytes(range(32))
T = TypeVar("T")


def memory(base: np.ndarray | None, tokens: Sequence[int]) -> np.ndarray:
    """The state after writing ``tokens`` to ``base``, [L, H, r, r] fp32: exact, and different for any other tokens."""
    state = np.zeros(SHAPE, np.int64) if base is None else base.astype(np.int64)
    places = np.arange(state.size, dtype=np.int64).reshape(SHAPE)
    for token in tokens:
        state = (state * 31 + (token + 1) * (2 * places + 7)) % 65521
    return state.astype(np.float32)


def make_service(store: str | StateStore = "memory://", **options: Any) -> SessionService:
    """A service over a store, given by its URL or as an object."""
    settings: dict[str, Any] = {
        "layout": LAYOUT,
        "adapter": ADAPTER,
        "model": MODEL,
        "state_shape": SHAPE,
        "queue_depth": 8,
        "queue_seconds": 10.0,
        "secret": SECRET,
        **options,
    }
    if isinstance(store, str):
        return SessionService(store_url=store, **settings)
    opened = service_module.open_store
    service_module.open_store = lambda url: store  # type: ignore[assignment]
    try:
        return SessionService(store_url="given", **settings)
    finally:
        service_module.open_store = opened


def drive(service: SessionService, scenario: Callable[[SessionService], Awaitable[T]], seconds: float = 30) -> T:
    """Run a coroutine on the service's own event loop, as its control server would, and close the service."""
    done: Future[T] = Future()

    async def run(started: SessionService) -> None:
        try:
            done.set_result(await asyncio.wait_for(scenario(started), seconds))
        except BaseException as e:
            done.set_exception(e)
        await asyncio.Event().wait()

    service.start(run)
    try:
        return done.result(seconds + 10)
    finally:
        service.close()


Scenario = Callable[[SessionService, SessionService], Awaitable[None]]


def drive_services(first: SessionService, second: SessionService, scenario: Scenario) -> None:
    """Run a scenario on two services, as two servers have; both have an event loop and a thread of their own."""

    async def outer(first: SessionService) -> None:
        loop = asyncio.get_running_loop()

        async def inner(second: SessionService) -> None:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(meet(second), loop))

        async def meet(second: SessionService) -> None:
            await scenario(first, second)

        await asyncio.to_thread(drive, second, inner)

    drive(first, outer)


def on(service: SessionService, coroutine: Any) -> "asyncio.Future[Any]":
    """Run a coroutine on a service's own loop."""
    return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, service._loop))


@contextmanager
def serving(service: SessionService, folder: Path) -> Iterator[str]:
    """The service behind its real control socket; yields the address."""
    address = f"ipc://{folder}/control"
    service.start(lambda started: serve(started, address))
    try:
        yield address
    finally:
        service.close()


def key(session: str) -> SessionKey:
    return SessionKey(TENANT, session)


def end_of(service: SessionService, session: str) -> np.ndarray:
    """The end state that the store has."""
    record = service.store.get(key(session))
    assert record is not None
    return record.end


def ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


async def admit(
    service: SessionService, session: str, prompt: Sequence[int], mode: Any = "readwrite", held: bool = False
) -> dict[str, Any]:
    ticket = secrets.token_hex(16)
    return {"ticket": ticket, **await service.admit(ticket, key(session), mode, ids(prompt), None, held)}


async def run(service: SessionService, ticket: str, prompt: Sequence[int], reply: Sequence[int]) -> dict[str, Any]:
    """What the engine does with an admitted request: claims it, runs it, commits it; returns the outcome."""
    grant = service.claim(ticket)
    assert grant is not None
    fed = [*prompt, *reply[:-1]]
    if grant.commits:
        service.commit(ticket, fed, memory(grant.base, fed))
    else:
        service.end(ticket, "unchanged")
    return await service.outcome(ticket)


async def turn(
    service: SessionService, session: str, prompt: Sequence[int], reply: Sequence[int], mode: Any = "readwrite"
) -> dict[str, Any]:
    """A whole request; returns its outcome."""
    granted = await admit(service, session, prompt, mode)
    return await run(service, granted["ticket"], prompt, reply)
