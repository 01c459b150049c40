"""The connection to Redis: the settings that durability rests on, retries, and errors as ours."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from deltamem_vllm.errors import ConfigError, StoreUnavailable
from deltamem_vllm.store import redis_scripts

T = TypeVar("T")
Durability = Literal["fsync", "bounded"]
logger = logging.getLogger("vllm.deltamem")

_LOSS = {
    ("yes", "always"): "",
    ("yes", "everysec"): "up to about 2 seconds of acknowledged commits",
    ("yes", "no"): "acknowledged commits that the kernel had not written yet, some 30 seconds",
}


class RedisLink:
    """A client of one server; every action it runs must be repeatable.

    Args:
        url: see ``RedisStore``.
        timeout_seconds: what a command may take.
        retry_seconds: how long a broken connection is tried again.

    Raises:
        ConfigError: the URL is not valid.
    """

    def __init__(self, url: str, *, namespace: str, timeout_seconds: float, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self._process = os.getpid()
        self._closed = False
        try:
            self.client: Any = redis.Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                health_check_interval=15,
                retry=Retry(NoBackoff(), 0),  # retries are ours: see run
                decode_responses=False,
            )
        except (ValueError, TypeError, RedisError):  # its message may quote the URL
            raise ConfigError("the store's redis:// URL is not valid; use redis://user@host:6379/0") from None
        given = self.client.connection_pool.connection_kwargs
        place = given.get("path") or f"{given.get('host', 'localhost')}:{given.get('port', 6379)}"
        self.where = f"redis://{place}/{given.get('db', 0)} ({namespace})"
        self._secret = str(given.get("password") or "")
        names = [name for name in vars(redis_scripts) if name.isupper()]
        self._scripts = {name: self.client.register_script(getattr(redis_scripts, name)) for name in names}

    def script(self, what: str, name: str, keys: list[bytes], *values: Any, retry_seconds: float | None = None) -> Any:
        """What a script of ``redis_scripts`` returns."""
        return self.run(what, lambda: self._scripts[name](keys=keys, args=values), retry_seconds)

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.client.close()

    def run(self, what: str, action: Callable[[], T], retry_seconds: float | None = None) -> T:
        """Run an action, again while the connection breaks; the action can be repeated.

        Args:
            retry_seconds: at most so long, if that is less than the link's own.

        Raises:
            StoreUnavailable: it did not succeed; the message names the server and the remedy.
        """
        deadline = time.monotonic() + min(self._retry_seconds, retry_seconds or self._retry_seconds)
        pause = 0.02
        while True:
            if self._closed:
                raise StoreUnavailable(f"the store {self.where} is closed")
            if os.getpid() != self._process:
                raise StoreUnavailable(f"the store {self.where} was opened before a fork. Open it in each process")
            try:
                return action()
            except RedisError as error:
                broken = isinstance(error, ConnectionError | TimeoutError)
                broken = broken and not isinstance(error, AuthenticationError)
                if not broken or time.monotonic() + pause > deadline:
                    raise self._ours(what, error) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _ours(self, what: str, error: RedisError) -> StoreUnavailable:
        text = " ".join(str(error).split())[:300]
        if self._secret:
            text = text.replace(self._secret, "***")
        if isinstance(error, OutOfMemoryError):
            remedy = "the server's memory is full; nothing was changed. Raise maxmemory or delete sessions"
        elif isinstance(error, ReadOnlyError):
            remedy = "the server is a replica. Connect to the primary"
        elif isinstance(error, AuthenticationError):
            remedy = "the server refused the password"
        elif isinstance(error, ConnectionError | TimeoutError):
            remedy = "the server cannot be reached. To learn whether a commit was applied, send it again"
        else:
            remedy = "the server refused it"
        return StoreUnavailable(f"cannot {what} {self.where}: {remedy} ({type(error).__name__}: {text})")

    def check_server(self, durability: Durability) -> None:
        """Refuse a server that loses what is acknowledged, unless that is accepted.

        Raises:
            ConfigError: with what would be lost, and the remedy.
        """
        try:
            found = self.run("open", lambda: self.client.config_get("append*", "maxmemory-policy"))
            settings = {_text(name): _text(value) for name, value in found.items()}
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, ResponseError):
                raise
            settings = {}  # CONFIG is forbidden, as in many hosted servers
        policy = settings.get("maxmemory-policy", "noeviction")
        if policy != "noeviction":
            raise ConfigError(f"{self.where} has maxmemory-policy {policy}: it erases sessions. Set noeviction")
        pair = (settings.get("appendonly", "?"), settings.get("appendfsync", "?"))
        unknown = "an unknown amount: it does not tell its settings" if pair[0] == "?" else ""
        loss = _LOSS.get(pair, unknown or "everything since its last snapshot")
        if not loss:
            return
        if durability != "bounded":
            raise ConfigError(
                f"{self.where} has appendonly {pair[0]}, appendfsync {pair[1]}: a power loss takes {loss}. Set"
                " appendonly yes and appendfsync always, or accept the loss by ?durability=bounded"
            )
        logger.warning("the store %s may lose %s", self.where, loss)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
