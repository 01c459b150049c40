"""How API processes talk to an engine's session service: one socket, questions and answers.

A Unix socket in a folder that only the server's user can enter; msgpack maps; a question carries a number that its
answer repeats. Nothing here is reachable from a network.

    admit    {ticket, tenant, session, mode, tokens (int32 bytes), salt, held, unwritten (spans), offered (spans),
              pins, history, if_match, elided, limits}
                                      → {salt, version, window, matched}
    outcome  {ticket}                 → {status, version, session, error}     answered when known (and durable)
    verdict  {ticket, tokens | None}  → {}
    reply    {tenant, session, version, digests} → {}
    spend    {tenant, per_minute}      → {}                        429 when the tenant's bucket is empty
    QUESTION {[tenant, session,] …}   → see `QUESTIONS`: all that is no generation

``limits``, the tenant's own [sessions, bytes] or nil, may be in any question that has a tenant, and holds from then on.
An error is answered as ``{"error": {type, message, status, retry_after, parameter, version}}`` and raised again by the
client.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq
import zmq.asyncio

from deltamem_vllm.errors import CapacityError, DeltaMemError, PreconditionFailed, SessionError, StoreError
from deltamem_vllm.sessions import inspection, management, pinning
from deltamem_vllm.sessions.chain import Cut
from deltamem_vllm.sessions.gauges import report
from deltamem_vllm.sessions.grants import History
from deltamem_vllm.sessions.histories import recall
from deltamem_vllm.sessions.masks import normal
from deltamem_vllm.store.protocol import SessionKey

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService

logger = logging.getLogger("vllm.deltamem")

LOOK_SECONDS = 0.5
"""How often a question that waits looks whether its engine is still there."""

QUESTIONS: dict[str, Callable[..., Awaitable[Any]]] = {
    "recall": recall,
    "metrics": report,
    **management.QUESTIONS,
    **inspection.QUESTIONS,
    **pinning.QUESTIONS,
}
"""Questions beside those that a generation needs, and who answers them; their fields are its arguments."""

_pack, _unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


def encode_error(error: BaseException) -> dict[str, Any]:
    """An error as it travels."""
    status = getattr(error, "status", None) or (503 if isinstance(error, StoreError) else 500)
    kind = next((c.__name__ for c in type(error).__mro__ if c in (CapacityError, SessionError, StoreError)), "other")
    message = str(error) if isinstance(error, DeltaMemError) else f"{type(error).__name__}: {error}"
    return {
        "error": {
            "type": kind,
            "message": message,
            "status": status,
            "retry_after": getattr(error, "retry_after", None),
            "parameter": getattr(error, "parameter", None),
            "version": getattr(error, "version", None),
        }
    }


def raise_error(answer: Any) -> Any:
    """The answer, or the error it carries."""
    if not (isinstance(answer, dict) and "error" in answer and isinstance(answer["error"], dict)):
        return answer
    e = answer["error"]
    if e["status"] == 412:
        raise PreconditionFailed(e["message"], version=e["version"])
    if e["type"] == "SessionError" or e["status"] == 404:
        raise SessionError(e["message"], status=e["status"], parameter=e["parameter"])
    if e["type"] == "CapacityError":
        raise CapacityError(e["message"], status=e["status"], retry_after=e["retry_after"] or 1.0)
    raise CapacityError(e["message"], status=e["status"], retry_after=e["retry_after"] or 5.0)


async def serve(service: "SessionService", address: str) -> None:
    """Answer questions at ``address`` until cancelled."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.bind(address)
    tasks: set[asyncio.Task[None]] = set()
    try:
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3:
                logger.warning("the session service was sent %d frames; a question has 3", len(frames))
                continue
            sender, number, body = frames
            task = asyncio.ensure_future(_answer(service, socket, sender, number, body))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        socket.close()
        context.term()


async def _answer(service: "SessionService", socket: Any, sender: bytes, number: bytes, body: bytes) -> None:
    try:
        answer = await _do(service, _unpack(body))
    except DeltaMemError as e:
        answer = encode_error(e)
    except asyncio.CancelledError:
        raise
    except Exception as e:
        logger.exception("a question to the session service failed")
        answer = encode_error(e)
    with contextlib.suppress(zmq.ZMQError):
        await socket.send_multipart([sender, number, _pack(answer)])


async def _do(service: "SessionService", q: dict[str, Any]) -> Any:
    if "limits" in q:
        service.quotas.note(q["tenant"], q.pop("limits"))
    match q["do"]:
        case "admit":
            tokens = np.frombuffer(q["tokens"], dtype=np.int32)
            key = SessionKey(q["tenant"], q["session"])
            return await service.admit(
                q["ticket"],
                key,
                q["mode"],
                tokens,
                q["salt"],
                q["held"],
                normal(q.get("unwritten", ())),
                offered=normal(q.get("offered", ())),
                pins=pinning.received(q.get("pins", ())),
                history=_history(q.get("history")),
                if_match=q.get("if_match"),
                elided=q.get("elided", 0),
            )
        case "outcome":
            return await service.outcome(q["ticket"])
        case "reply":
            service.note_reply(SessionKey(q["tenant"], q["session"]), q["version"], q["digests"])
            return {}
        case "verdict":
            service.give_verdict(q["ticket"], q["tokens"])
            return {}
        case "spend":
            service.rates.spend(q["tenant"], q["per_minute"])
            return {}
        case other if other in QUESTIONS:
            return await QUESTIONS[other](service, **_arguments(q))
        case other:
            raise ValueError(f"unknown question {other!r}")


def _arguments(q: dict[str, Any]) -> dict[str, Any]:
    """A question's fields as arguments; ``tenant`` and ``session`` are a key."""
    rest = {name: value for name, value in q.items() if name != "do"}
    if "session" in rest:
        rest["key"] = SessionKey(rest.pop("tenant"), rest.pop("session"))
    return rest


def _history(sent: Any) -> History | None:
    if sent is None:
        return None
    cut = Cut(sent["cut"][2], sent["cut"][0], sent["cut"][1]) if sent["cut"] is not None else None
    return History(sent["version"], sent["messages"], sent["link"], cut)


class ControlClient:
    """Asks one engine's session service from an event loop.

    Args:
        address: ZeroMQ address of the engine's control socket.
        gone: whether the engine has ended, so that nobody will answer.
    """

    def __init__(self, address: str, gone: Callable[[], bool] = lambda: False) -> None:
        self.address = address
        self._gone = gone
        self._numbers = itertools.count(1)
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(address)
        self._reader: asyncio.Task[None] | None = None

    async def ask(self, do: str, timeout: float = 30.0, **question: Any) -> Any:
        """One question, its answer.

        Raises:
            SessionError, CapacityError: what the service answered; CapacityError 503 also when it does not answer.
        """
        if self._reader is None:
            self._reader = asyncio.ensure_future(self._read())
        number = next(self._numbers).to_bytes(8, "little")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await self._socket.send_multipart([number, _pack({"do": do, **question})])
            end = time.monotonic() + timeout
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the answer.
            while not answer.done() and (left := end - time.monotonic()) > 0:
                if self._gone():
                    raise CapacityError("the engine has ended: retry when the server runs again", status=503)
                await asyncio.wait({answer}, timeout=min(left, LOOK_SECONDS))
            if not answer.done():
                raise CapacityError(f"the session service did not answer {do!r} within {timeout:g} s", status=503)
            return raise_error(_unpack(answer.result()))
        finally:
            self._waiting.pop(number, None)

    async def _read(self) -> None:
        while True:
            number, body = await self._socket.recv_multipart()
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(body)

    def close(self) -> None:
        """Drop the connection; open questions are never answered."""
        if self._reader is not None:
            self._reader.cancel()
        self._socket.close()
        self._context.term()


class BlockingControlClient:
    """The same questions without an event loop, for offline use; one question at a time."""

    def __init__(self, address: str) -> None:
        self._numbers = itertools.count(1)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(address)

    def ask(self, do: str, timeout: float = 30.0, meanwhile: Callable[[], None] | None = None, **question: Any) -> Any:
        """See `ControlClient.ask`.

        Args:
            meanwhile: called again and again until the answer is there.
        """
        number = next(self._numbers).to_bytes(8, "little")
        self._socket.send_multipart([number, _pack({"do": do, **question})])
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            if not self._socket.poll(1 if meanwhile is not None else int(left * 1000)):
                if meanwhile is not None:
                    meanwhile()
                continue
            answered, body = self._socket.recv_multipart()
            if answered == number:
                return raise_error(_unpack(body))
        raise CapacityError(f"the session service did not answer {do!r} within {timeout:g} s", status=503)

    def close(self) -> None:
        """Drop the connection."""
        self._socket.close()
        self._context.term()
