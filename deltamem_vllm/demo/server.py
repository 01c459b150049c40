"""A handle on one ``vllm serve`` with the plugin: start it, wait for it, kill it, start it again. Tests use it too.

    with VllmServer(model, adapter, "sqlite:////tmp/sessions.db", *SMALL) as server:
        server.wait_ready()
        httpx.get(f"{server.base_url}/v1/models")
        server.kill()     # as a crash would
        server.start()    # same port, same store
        server.wait_ready()

The server runs in a process group of its own, and leaving the ``with`` block ends the whole group, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

SMALL = ("--max-model-len", "512", "--block-size", "32", "--dtype", "float32", "--enforce-eager")
"""Arguments that suit a model of a few million parameters at most, on a CPU."""
ONE_WORKER = ("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor")
"""The engine's worker within its process, as on one GPU. On a CPU vLLM gives it a process of its own, which takes a
third of a start."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}
_DEFAULTS = {"OMP_NUM_THREADS": "1"}


class ServerFailed(Exception):
    """The server ended, or was not ready in time; the message ends with the last lines of its log."""


class VllmServer:
    """One server, which may be started again after `kill` or `stop`.

    Args:
        model: model folder or name, as for ``vllm serve``.
        adapter: δ-mem adapter folder; None serves the model without the plugin.
        store_url: where sessions persist, as for ``--deltamem-store``.
        extra_args: further arguments of ``vllm serve``.
        env: environment on top of ours; ``VLLM_PLUGINS`` and ``DELTAMEM_*`` of this process are not passed on.
        port: loopback port; None picks a free one.
        log: file to append the server's output to; None makes one in the temporary folder.

    Attributes:
        log: that file.
        base_url: ``http://127.0.0.1:PORT``; the same after a restart.
        pid: process id of the running server, which is also its process group; None when it does not run.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path | None,
        store_url: str,
        *extra_args: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        log: Path | None = None,
    ) -> None:
        self.port = port if port is not None else free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = log if log is not None else _new_log()
        self.command = [vllm_command(), "serve", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        if adapter is not None:
            self.command += ["--plugin", "deltamem", "--deltamem-adapter", str(adapter), "--deltamem-store", store_url]
        self.command += extra_args
        self._env = {**environment(), **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """See the class."""
        return None if self._process is None else self._process.pid

    def start(self) -> VllmServer:
        """Start the server; returns at once (see `wait_ready`).

        Raises:
            RuntimeError: it runs already.
        """
        if self._process is not None:
            raise RuntimeError(f"the server at {self.base_url} runs already: stop() or kill() it first")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        return self

    def wait_ready(self, timeout: float = 300.0, waiting: Callable[[float], None] | None = None) -> float:
        """Wait until the server answers ``/health``.

        Args:
            timeout: seconds.
            waiting: called a few times a second with the seconds waited so far.

        Returns:
            seconds waited.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            if self._process is None or self._process.poll() is not None:
                code = None if self._process is None else self._process.returncode
                raise ServerFailed(f"the server ended with {code} before it was ready\n{self.last_lines()}")
            if self.healthy():
                return waited
            if waited > timeout:
                raise ServerFailed(f"the server was not ready after {timeout:.0f} s\n{self.last_lines()}")
            if waiting is not None:
                waiting(waited)
            time.sleep(0.25)

    def healthy(self) -> bool:
        """Whether ``/health`` answers 200 right now."""
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9 the whole process group, as a crash of the machine would, and wait until it is gone."""
        self._end(signal.SIGKILL, 0.0)

    def stop(self, timeout: float = 30.0) -> None:
        """Ask the server to end; kill what is left of it after ``timeout`` seconds."""
        self._end(signal.SIGTERM, timeout)

    def last_lines(self, count: int = 12) -> str:
        """The end of the log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"the last lines of {self.log}:", *(f"    {line}" for line in lines[-count:])])

    def __enter__(self) -> VllmServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(timeout=30.0 if error is None else 5.0)

    def _end(self, how: signal.Signals, patience: float) -> None:
        process = self._process
        if process is None:
            return
        try:
            if process.poll() is None and how != signal.SIGKILL:
                process.send_signal(how)  # it ends its own children
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        finally:  # also when a second Ctrl-C cuts the wait short
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None
        end = time.monotonic() + 10.0
        while group_members(process.pid) and time.monotonic() < end:
            time.sleep(0.02)


def environment() -> dict[str, str]:
    """The environment a small local server runs in."""
    ours = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS" and not k.startswith("DELTAMEM_")}
    return {**_DEFAULTS, **ours, **_ENVIRONMENT}


def vllm_command() -> str:
    """Path of the ``vllm`` command that belongs to this interpreter."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise ServerFailed(f"there is no vllm command beside {sys.executable}: install vLLM there")
    return found


def free_port() -> int:
    """A loopback port that nothing listens on right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def group_members(group: int) -> list[int]:
    """Processes of a group that still run (Linux); those that ended and wait to be reaped do not count."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, in_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(in_group) == group and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def _new_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="deltamem-vllm-serve-", suffix=".log")
    os.close(handle)
    return Path(name)
