"""One arm of a comparison: a vLLM engine in a process of its own, which times each of its steps.

Arms must not share a process (plugins, compiled graphs and settings are per process), and only one of them works at a
time: an engine's core is in the arm's own process and runs only when it is told to step, so that arms can take turns
step by step. Each is started by `Arm`; the two talk through a pipe, and what the engine prints goes to a log that an
error quotes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.report.placement import PackedWeights, give_back, take, use_large_pages
from deltamem_vllm.server.tenants import DEFAULT_TENANT
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.url import open_store

START_SECONDS = 900.0
"""An engine that compiles a large model may take so long to start."""


class ArmError(DeltaMemError):
    """An engine under measurement failed or died; ends with the tail of its log."""


@dataclass(frozen=True)
class Setup:
    """An engine to measure.

    Attributes:
        model: folder.
        adapter: δ-mem adapter folder; None is vLLM without the plugin.
        kernel: as ``--deltamem-kernel``.
        lora: folder of a LoRA adapter that every request uses.
        options: arguments of ``vllm.LLM``.
        env: environment variables.
    """

    model: str
    adapter: str | None = None
    kernel: str | None = None
    lora: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """What one batch took, of the seconds that were this arm's.

    Attributes:
        first: seconds from the batch's start to the first token of the last of its requests.
        gaps: seconds of each step while all requests decode.
        commit: seconds from the last token to the last durable commit; 0 without sessions.
    """

    first: float
    gaps: list[float]
    commit: float


class Arm:
    """A running engine; a context manager."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="deltamem-arm-")
        self._log = Path(self._folder.name, "log")
        self._pipe, theirs = Pipe()
        defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deltamem_vllm.report", str(theirs.fileno())],
                env={**defaults, **os.environ, **setup.env, **in_process},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that one signal ends the workers, too
            )
        theirs.close()
        try:
            self._call("start", setup, f"sqlite:///{self._folder.name}/sessions.db")
        except BaseException:
            self.close()
            raise

    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """Take a batch of prompts (token ids), to generate so many tokens for each. With an adapter request i writes
        session ``i``, a new window each time.

        Raises:
            ArmError: the engine failed.
        """
        self._call("begin", prompts, tokens)

    def step(self) -> bool:
        """Let the engine take one step; whether the batch needs more.

        Raises:
            ArmError: the engine failed.
        """
        return bool(self._call("step"))

    def end(self) -> Timing:
        """What the batch took, once its commits are durable.

        Raises:
            ArmError: a commit failed.
        """
        timing: Timing = self._call("end")
        return timing

    def move_out(self) -> None:
        """Between batches, give back the memory of packed weights and of the KV cache (`placement`).

        Raises:
            ArmError: the engine's process died.
        """
        self._call("move_out")

    def move_in(self) -> tuple[int, int]:
        """Take memory for what `move_out` has given back, in large pages, and fill it; how many weights there are, and
        the KV cache's bytes.

        Raises:
            ArmError: the engine's process died, or there is no room.
        """
        taken: tuple[int, int] = self._call("move_in")
        return taken

    def run_on(self, core: int) -> None:
        """Have the thread that takes the engine's steps, and those that it starts from now on, run on one core; others
        run where they like."""
        os.sched_setaffinity(self._process.pid, {core})

    def facts(self) -> dict[str, Any]:
        """See `Served.facts`; and ``peak_bytes``: most memory that the engine's processes have held, added up."""
        found: dict[str, Any] = self._call("facts")
        return {**found, "peak_bytes": sum(_peak(pid) for pid in _group(self._process.pid))}

    def close(self) -> None:
        """End the engine and everything it started."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Arm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, name: str, *args: Any) -> Any:
        try:
            self._pipe.send((name, args))
            if not self._pipe.poll(START_SECONDS):
                raise ArmError(f"{self.name}: no answer to {name!r} within {START_SECONDS:.0f} s{self._tail()}")
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise ArmError(f"{self.name}: the engine's process died in {name!r}{self._tail()}") from None
        if not good:
            raise ArmError(f"{self.name}: {name!r} failed: {answer}{self._tail()}")
        return answer

    def _tail(self, lines: int = 400) -> str:
        log = self._log.read_text(errors="replace").splitlines()
        return "\n--- its log ends:\n" + "\n".join(log[-lines:])


def _group(leader: int) -> list[int]:
    """Processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if os.getpgid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


def _peak(pid: int) -> int:
    """Most bytes that a process has held in memory at once; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Served:
    """The engine's side of the pipe."""

    def __init__(self) -> None:
        self.sessions: Any = None
        self.llm: Any = None
        self.lora: Any = None
        self._store = ""
        self._names = 0
        self._tickets: list[str] = []
        self._waiting: set[str] = set()
        self._timing = Timing(0.0, [], 0.0)
        self._weights = PackedWeights()

    def start(self, setup: Setup, store: str) -> None:
        """Start the engine."""
        from vllm import _custom_ops

        options, self._store = dict(setup.options), store
        self._weights.watch(_custom_ops)
        if setup.lora is not None:
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("arm", 1, setup.lora)
            options |= {"enable_lora": True}
        if setup.adapter is None:
            from vllm import LLM

            self.llm = LLM(setup.model, **options)
            return
        from deltamem_vllm.offline import SessionLLM

        self.sessions = SessionLLM(setup.model, adapter=setup.adapter, store=store, kernel=setup.kernel, **options)
        self.llm = self.sessions.llm

    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """See `Arm.begin`."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        requests: list[tuple[Any, Any]] = [({"prompt_token_ids": list(p)}, params) for p in prompts]
        begun = time.perf_counter()
        if self.sessions is not None:
            from deltamem_vllm.offline import Turn

            admitted = [self.sessions.admit(Turn(p, f"{i}", sampling=params)) for i, p in enumerate(prompts)]
            requests = [(a.prompt, a.sampling) for a in admitted]
            self._tickets = [a.ticket for a in admitted]
        self._waiting = set()
        for prompt, sampling in requests:
            self._names += 1
            name = f"arm-{self._names}"
            self._waiting.add(name)
            self.llm.llm_engine.add_request(name, prompt, sampling, lora_request=self.lora)
        self._timing = Timing(time.perf_counter() - begun, [], 0.0)

    def step(self) -> bool:
        """See `Arm.step`."""
        begun = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        took = time.perf_counter() - begun
        if self._waiting:
            self._timing = replace(self._timing, first=self._timing.first + took)
            self._waiting -= {output.request_id for output in outputs}
        elif outputs:
            self._timing.gaps.append(took)
        return bool(self.llm.llm_engine.has_unfinished_requests())

    def end(self) -> Timing:
        """See `Arm.end`."""
        begun = time.perf_counter()
        for ticket in self._tickets:
            if (outcome := self.sessions.outcome(ticket))["status"] != "committed":
                raise ArmError(f"a commit of the benchmark did not become durable: {outcome}")
        commit = time.perf_counter() - begun if self._tickets else 0.0
        self._tickets = []
        return replace(self._timing, commit=commit)

    def move_out(self) -> None:
        """See `Arm.move_out`."""
        self._weights.drop()
        give_back(self._caches())

    def move_in(self) -> tuple[int, int]:
        """See `Arm.move_in`."""
        taken = self._weights.pack(), take(self._caches())
        use_large_pages()
        return taken

    def _caches(self) -> list[Any]:
        """Each layer's KV cache."""
        layers = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        return [cache for layer in layers if (cache := getattr(layer, "kv_cache", None)) is not None]

    def facts(self) -> dict[str, Any]:
        """The engine's settings, and what its sizes came to: tokens that its KV cache holds, and bytes of one session's
        record in the store (None without sessions)."""
        config = self.llm.llm_engine.vllm_config
        record = None
        if self.sessions is not None:
            with contextlib.closing(open_store(self._store)) as store:
                kept = store.get(SessionKey(DEFAULT_TENANT, "0"))
            record = None if kept is None else len(encode(kept))
        return {
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "vocabulary": config.model_config.get_vocab_size(),
            "layers": config.model_config.hf_text_config.num_hidden_layers,
            "block_size": config.cache_config.block_size,
            "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            "compilation": config.compilation_config.mode.name,
            "record_bytes": record,
        }

    def stop(self) -> None:
        """Shut the engine down."""
        if self.sessions is not None:
            self.sessions.close()
        elif self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()


def main() -> None:
    """Answer until the other side closes the pipe, whose file descriptor is the only argument."""
    number = int(sys.argv[1])
    os.set_inheritable(number, False)
    pipe, served = Connection(number), Served()
    try:
        while True:
            name, args = pipe.recv()
            try:
                answer = (True, getattr(served, name)(*args))
            except Exception as error:  # noqa: BLE001  told to who asked
                traceback.print_exc()
                answer = (False, f"{type(error).__name__}: {error}")
            sys.stderr.flush()
            pipe.send(answer)
    except (EOFError, OSError):
        served.stop()
        gc.freeze()  # the interpreter's end would look through all that an engine has made, several times over
