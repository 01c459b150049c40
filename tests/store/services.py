"""PostgreSQL and Redis for tests: throw-away instances on loopback, in temporary folders, stopped at the end;
and a TCP proxy that cuts connections."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Data lies in memory where it can: what is tested here is not the disk."""
INSTALL = "deploy/ci/install-services.sh"


def binary(name: str, *places: str) -> str:
    """Path of a server's program; fails with the remedy, because a skipped test would hide a broken store."""
    found = shutil.which(name)
    for place in places:
        found = found or next((str(each) for each in sorted(Path("/").glob(place), reverse=True)), None)
    if found is None:
        raise RuntimeError(f"{name} is not installed: run {INSTALL} as root")
    return found


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_nobody() -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []


class Server:
    """A server process with a port; can be stopped and started again on the same data."""

    def __init__(self, folder: Path, command: list[str], port: int, ready: Callable[[], bool]) -> None:
        self.folder, self.port = folder, port
        self._command, self._ready = command, ready
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop(9)
                raise RuntimeError(f"{self._command} did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, how: int = 2) -> None:
        """Send a signal (2: orderly for both servers, 9: kill) and wait."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None


def answers(port: int, ask: bytes, *starts: bytes) -> Callable[[], bool]:
    """Whether a server on ``port`` answers ``ask`` with something that begins as one of ``starts``."""

    def ready() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as peer:
            peer.settimeout(1)
            peer.sendall(ask)
            return peer.recv(64).startswith(starts)
        return False

    return ready


@contextlib.contextmanager
def postgres() -> Iterator[Server]:
    """A PostgreSQL server with superuser ``test``, database ``postgres``, trust on loopback."""
    initdb = str(Path(binary("initdb", "usr/lib/postgresql/*/bin/initdb")).resolve())  # postgres lies beside it
    with tempfile.TemporaryDirectory(prefix="deltamem-pg-", dir=FOLDER) as name:
        folder, port = Path(name), free_port()
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        data = folder / "data"
        setup = [*as_nobody(), initdb, "-D", str(data), "-U", "test", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        made = subprocess.run(setup, cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr[-2000:]}")
        settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder}
        settings |= {"max_connections": 120, "shared_buffers": "32MB", "synchronous_commit": "off"}
        command = [*as_nobody(), str(Path(initdb).with_name("postgres")), "-D", str(data)]
        command += [part for option, value in settings.items() for part in ("-c", f"{option}={value}")]
        startup = (0x00030000).to_bytes(4, "big") + b"user\0test\0database\0postgres\0\0"
        server = Server(folder, command, port, answers(port, (len(startup) + 4).to_bytes(4, "big") + startup, b"R"))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def redis(*options: str) -> Iterator[Server]:
    """A Redis server; by default every write is synced, as ``appendfsync always`` does."""
    program = binary("redis-server")
    with tempfile.TemporaryDirectory(prefix="deltamem-redis-", dir=FOLDER) as name:
        folder, port = Path(name), free_port()
        command = [program, "--port", f"{port}", "--bind", "127.0.0.1", "--dir", name, "--save", ""]
        command += list(options or ("--appendonly", "yes", "--appendfsync", "always"))
        server = Server(folder, command, port, answers(port, b"PING\r\n", b"+PONG", b"-NOAUTH"))
        server.start()
        try:
            yield server
        finally:
            server.stop(15)


class Proxy:
    """A TCP proxy to a loopback port, with a knife.

    ``forward`` and ``backward`` see each chunk (client to server, server to client) before it is passed on.
    They return True to pass it, or False to cut the connection; raising :class:`CutAfter` passes the chunk
    first.

    Attributes:
        port: where to connect.
        down: while True, connections are refused and open ones are cut.
    """

    class CutAfter(Exception):
        """Pass the chunk on, then cut before anything comes back."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.forward: Callable[[bytes], bool] = lambda data: True
        self.backward: Callable[[bytes], bool] = lambda data: True
        self.down = False
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                if self.down:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((client, server))
            for source, sink, look in ((client, server, "forward"), (server, client, "backward")):
                threading.Thread(target=self._pump, args=(source, sink, look, client, server), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, look: str, *pair: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                try:
                    if not getattr(self, look)(data):
                        self.cuts += 1
                        break
                except Proxy.CutAfter:
                    self.cuts += 1
                    shut(pair[0])  # the client hears nothing more; the server gets the whole chunk
                    sink.sendall(data)
                    time.sleep(0.05)
                    break
                sink.sendall(data)
        for each in pair:
            shut(each)

    def cut(self) -> None:
        """Cut every open connection."""
        for pair in self._pairs:
            for each in pair:
                shut(each)
        self._pairs.clear()

    def close(self) -> None:
        shut(self._listener)
        self.cut()


def shut(each: socket.socket) -> None:
    """Close a socket that another thread may be reading."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
