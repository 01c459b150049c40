"""A vLLM engine with δ-mem in a process of its own, as tests use it: start, ask, read what was stored, stop.

One engine per configuration, because vLLM's settings, compiled graphs and plugins are per process. The process runs
`tests.engine.process`; the two talk through a pipe, and everything it prints goes to a log that an error quotes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamem_vllm.server.tenants import DEFAULT_TENANT
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.protocol import Record, SessionKey
from deltamem_vllm.store.url import open_store
from tests.engine.asking import Ask, Reply
from tests.engine.measured import note_start

if TYPE_CHECKING:
    from tests.engine.stepping import Aborted

ROOT = Path(__file__).parents[2]
START_SECONDS = 280.0
CALL_SECONDS = 200.0
STOP_SECONDS = 20.0

DEFAULTS: Mapping[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "disable_log_stats": False,  # preemptions, accepted drafts and hits are read from the metrics
}
ONE_WORKER: Mapping[str, Any] = {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
"""The worker within the engine core's process, as on one GPU; on a CPU vLLM gives it one more, slow to start."""
ASK_INSIDE: Mapping[str, str] = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@dataclass(frozen=True)
class Setup:
    """A configuration of an engine.

    Attributes:
        model, adapter: folders; no adapter is vLLM without δ-mem.
        options: arguments of ``vllm.LLM`` beyond `DEFAULTS`.
        slots: size of the session pool.
        env: environment variables.
        path: folders put before all others on ``PYTHONPATH``.
        workers: vLLM decides how many processes the workers get.
        stepped: the engine's core is in the same process and stepped by hand; requests run one after the other.
    """

    model: Path
    adapter: Path | None
    options: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 64
    env: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    workers: bool = False
    stepped: bool = False


class EngineError(AssertionError):
    """The engine's process failed, died or did not answer; ends with the tail of its log."""


class Engine:
    """A running engine; a context manager.

    Args:
        name: for the report of deviations.
    """

    def __init__(self, setup: Setup, name: str = "engine") -> None:
        self.setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="deltamem-engine-")
        self.folder = Path(self._folder.name)
        self._log = self.folder / "log"
        self._pipe, theirs = Pipe()
        began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.process", str(theirs.fileno())],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that one signal ends the workers, too
            )
        theirs.close()
        try:
            self._call(START_SECONDS, "start", self.setup, self._options, self._store_url)
        except BaseException:
            self.stop()
            raise
        note_start(name, time.monotonic() - began)

    def run(self, *asks: Ask) -> list[Reply]:
        """Run requests together in one batch."""
        replies: list[Reply] = self._call(CALL_SECONDS, "run", asks)
        return replies

    def run_in_step(self, *asks: Ask) -> list[Reply]:
        """Run requests in one batch that the engine begins only when it has all of them.

        Which requests share a step, and so how sums are rounded, is then the same each time.
        """
        replies: list[Reply] = self._call(CALL_SECONDS, "run_in_step", asks)
        return replies

    def abort(self, ask: Ask, after: int) -> Aborted:
        """Begin a request and abort it after so many steps of a ``stepped`` engine."""
        aborted: Aborted = self._call(CALL_SECONDS, "abort", ask, after)
        return aborted

    def run_on(self, ask: Ask, kept: int | None) -> Reply:
        """A request with stop strings that a ``stepped`` engine completes before it hears how it has ended.

        That is after ``kept`` tokens, or (None) without a client.
        """
        reply: Reply = self._call(CALL_SECONDS, "run_on", ask, kept)
        return reply

    def one(self, ask: Ask) -> Reply:
        """Run one request alone."""
        return self.run(ask)[0]

    def info(self, session: str) -> dict[str, Any] | None:
        """What the engine says of a session."""
        found: dict[str, Any] | None = self._call(CALL_SECONDS, "info", session)
        return found

    def delete(self, session: str) -> bool:
        """Delete a session; whether there was one."""
        return bool(self._call(CALL_SECONDS, "delete", session))

    def metric(self, name: str) -> float:
        """Sum of a counter of vLLM's over all labels."""
        return float(self._call(CALL_SECONDS, "metric", name))

    def setting(self, path: str) -> Any:
        """A value of vLLM's configuration, as ``scheduler_config.async_scheduling``."""
        return self._call(CALL_SECONDS, "setting", path)

    def imported(self, module: str) -> bool:
        """Whether the engine's process has imported a module."""
        return bool(self._call(CALL_SECONDS, "imported", module))

    def compiled_graphs(self) -> int:
        """Graphs that torch.compile has traced in the first worker; needs `ASK_INSIDE` in the environment."""
        return int(self._call(CALL_SECONDS, "compiled_graphs"))

    def launches(self) -> dict[str, int]:
        """What the first worker's compiled model calls, by name; needs `ASK_INSIDE` in the environment."""
        found: dict[str, int] = self._call(CALL_SECONDS, "launches")
        return found

    def pool_states(self) -> list[bytes]:
        """Per slot of the first worker's session pool, its bytes; needs `ASK_INSIDE` in the environment."""
        states: list[bytes] = self._call(CALL_SECONDS, "pool_states")
        return states

    def wrapped_layers(self) -> list[dict[str, dict[str, str]]]:
        """See `tests.engine.inside.wrapped_layers`; needs `ASK_INSIDE` in the environment."""
        layers: list[dict[str, dict[str, str]]] = self._call(CALL_SECONDS, "wrapped_layers")
        return layers

    def plant(self, bug: str) -> None:
        """Plant a bug in the session pools (see `tests.engine.inside.plant`; needs `ASK_INSIDE`), or in a ``stepped``
        engine (see `tests.engine.stepping`)."""
        self._call(CALL_SECONDS, "plant", bug)

    def records(self, sessions: Iterable[str]) -> list[Record | None]:
        """Committed records, read from the store's file by this process."""
        store = open_store(self._store_url)
        try:
            return [store.get(SessionKey(DEFAULT_TENANT, session)) for session in sessions]
        finally:
            store.close()

    def record(self, session: str) -> Record | None:
        """A session's committed record, or None."""
        return self.records([session])[0]

    def record_bytes(self, session: str) -> bytes:
        """The committed record as it is stored."""
        record = self.record(session)
        assert record is not None, f"session {session} has no record"
        return encode(record)

    def state(self, session: str) -> np.ndarray:
        """[layers, H, r, r]: the committed memory."""
        record = self.record(session)
        assert record is not None, f"session {session} has no record"
        return record.end

    @property
    def log(self) -> str:
        """What the engine has printed."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Stop the engine and everything it started."""
        with contextlib.suppress(OSError):
            self._pipe.close()  # asks the process to end by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _options(self) -> dict[str, Any]:
        one = {} if self.setup.workers or self.setup.stepped else ONE_WORKER
        return {**DEFAULTS, **one, **self.setup.options}

    @property
    def _store_url(self) -> str:
        return f"sqlite:///{self.folder / 'sessions.db'}"

    def _environment(self) -> dict[str, str]:
        given = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "DELTAMEM_"))}
        return {
            **given,
            "PYTHONPATH": os.pathsep.join(filter(None, [*self.setup.path, str(ROOT), given.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            **self.setup.env,
        }

    def _call(self, seconds: float, name: str, *args: Any) -> Any:
        try:
            self._pipe.send((name, args))
            if not self._pipe.poll(seconds):
                raise EngineError(f"no answer to {name!r} within {seconds:g} s{self._tail()}")
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise EngineError(f"the engine's process died in {name!r}{self._tail()}") from None
        if not good:
            raise EngineError(f"{name!r} failed: {answer}{self._tail()}")
        return answer

    def _tail(self, lines: int = 60) -> str:
        return "\n--- the engine's log ends:\n" + "\n".join(self.log.splitlines()[-lines:])
