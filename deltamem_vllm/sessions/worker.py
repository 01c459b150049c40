"""The worker's half of the connector: carries out a step's orders before its forward pass."""

import contextlib
import logging

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from deltamem_vllm.config import Settings
from deltamem_vllm.memory.pages import StatePages
from deltamem_vllm.memory.scan import kernels_for
from deltamem_vllm.memory.watching import gate_means, typical_outputs
from deltamem_vllm.ops.paged import WRITE_OFF
from deltamem_vllm.sessions.pool import SessionPool, StaleOrder
from deltamem_vllm.sessions.quality import SAMPLED
from deltamem_vllm.sessions.steps import Answer, Commit, Step

logger = logging.getLogger("vllm.deltamem")


class WorkerSide:
    """Owns the session pool of one worker.

    Args:
        layer_ids: the adapter's layers, in the order of axis 0 of a session state.
    """

    def __init__(self, vllm_config: VllmConfig, settings: Settings, layer_ids: list[int]) -> None:
        self._vllm_config, self._settings, self._layer_ids = vllm_config, settings, layer_ids
        self._pool: SessionPool | None = None
        self._indices: tuple[int, ...] = ()
        self._answer = Answer()
        self._done: set[str] = set()
        self._taken = 0  # commits so far
        self.hook_errors = 0

    def bind(self) -> None:
        """vLLM has bound the KV caches: find this worker's pages."""
        context = self._vllm_config.compilation_config.static_forward_context
        layers = sorted((x for x in context.values() if isinstance(x, StatePages)), key=lambda x: x.index)
        self._indices = tuple(self._layer_ids.index(x.index) for x in layers)
        if layers:  # a pipeline stage may hold none of the adapter's layers
            assert layers[0].pages is not None
            kernels = kernels_for(layers[0].pages.device, self._settings.kernel, layers[0].shape)
            self._pool = SessionPool(layers, list(self._indices), self._settings.session_slots, kernels)
            outputs = typical_outputs(layers)
            self._answer.sample.outputs = dict(zip(self._indices, outputs, strict=False))

    @torch.inference_mode()
    def carry_out(self, step: Step) -> None:
        """Commits first (their pages may be overwritten from now on), then zeroing, then what starts: seeds, marks."""
        if self._pool is None:
            self._done.update(c.request for c in step.commits)
            self._done.update(step.release)
            return
        ships = get_tensor_model_parallel_rank() == 0
        for commit, taken in zip(step.commits, self._pool.take(step.commits), strict=True):
            if isinstance(taken, Exception):  # one session must not end the engine for all
                self._refuse(commit.request, "the state of a request could not be taken", taken)
            elif ships:
                self._answer.states[commit.request] = [(self._indices, taken)]
                self._look_at(commit)
            self._done.add(commit.request)
        self._done.update(step.release)
        try:
            self._pool.zero(step.zero)
        except Exception:
            logger.exception("slots %s of the session pool could not be zeroed", step.zero)
        for seed, error in zip(step.seeds, self._pool.seed(step.seeds), strict=True):
            if error is not None:
                self._refuse(seed.request, "a request could not be given its memory", error)
                with contextlib.suppress(ValueError):  # no such block: that is the error
                    self._pool.set_limit(seed.block, WRITE_OFF)

        for mark, error in zip(step.marks, self._pool.mark(step.marks), strict=True):
            if error is not None:  # it writes what it must not: its commit is refused
                self._refuse(mark.request, "the write mask of a request could not be set", error)

    def _look_at(self, commit: Commit) -> None:
        """Of some commits, the gates."""
        self._taken += 1
        if self._taken % SAMPLED != 1:
            return
        assert self._pool is not None
        try:
            tokens = self._pool.layers[0].tokens
            block = self._pool.kernel_block(commit.block) + (commit.count - 1) // tokens
            means = gate_means(self._pool.layers, block, (commit.count - 1) % tokens + 1)
            self._answer.sample.gates.update(zip(self._indices, means, strict=False))
        except Exception:
            logger.exception("the gates of a commit could not be looked at")
            self.hook_errors += 1

    def _refuse(self, request: str, what: str, error: Exception) -> None:
        logger.error("%s: %s", what, error, exc_info=error)
        self._answer.errors[request] = f"{type(error).__name__}: {error}"
        if isinstance(error, StaleOrder):
            self._answer.stale.add(request)

    def take_answer(self) -> Answer | None:
        """What this step brought, once."""
        if not (self._answer.states or self._answer.errors):
            return None  # what else there is waits for the next one
        answer, self._answer = self._answer, Answer()
        answer.hook_errors, self.hook_errors = self.hook_errors, 0
        return answer

    def take_done(self) -> set[str] | None:
        """Requests whose blocks may be freed."""
        done, self._done = self._done, set()
        return done or None
