"""The KV connector: vLLM's hooks, each handed to the scheduler's or the worker's half.

An exception that leaves a hook ends the engine for every user, so none does: it is logged, and the request it
belongs to goes without memory or without a commit, which its outcome then says.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import KVCacheConfig

from deltamem_vllm import metrics
from deltamem_vllm.adapter.weights import load_adapter
from deltamem_vllm.audit.log import AuditLog, audit_file, read_key
from deltamem_vllm.config import Settings, settings_of
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.folders import hold
from deltamem_vllm.memory.pages import SUFFIX
from deltamem_vllm.memory.preflight import backbone_shape, model_fingerprint
from deltamem_vllm.redaction import install
from deltamem_vllm.sessions.control import serve
from deltamem_vllm.sessions.quality import corrections_of
from deltamem_vllm.sessions.scheduler import SchedulerSide
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.sessions.steps import Answer, Step
from deltamem_vllm.sessions.worker import WorkerSide

logger = logging.getLogger("vllm.deltamem")
_T = TypeVar("_T")


def _guarded(instead: Callable[[], _T]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Log what a hook raises and answer ``instead()``."""

    def decorate(hook: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(hook)
        def safe(self: Any, *args: Any, **kwargs: Any) -> _T:
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                logger.exception("deltamem: %s failed; the engine goes on", hook.__name__)
                self.count_error()
                return instead()

        return safe

    return decorate


def _audit(settings: Settings, rank: int) -> AuditLog | None:
    """This engine's audit log; all engines name sessions with one key."""
    if not settings.audit:
        return None
    key = read_key(audit_file(settings.audit, 0))
    return AuditLog(audit_file(settings.audit, rank), key, required=settings.audit_required)


class DeltaMemConnector(KVConnectorBase_V1, SupportsHMA):
    """Selected by ``--plugin deltamem``; vLLM makes one in the scheduler and one in each worker.

    Attributes:
        transfers_no_layers: what a step orders is carried out before its first layer (`compat.skip_layer_transfers`).
    """

    transfers_no_layers = True

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = settings_of(vllm_config)
        if settings is None:
            raise ConfigError("DeltaMemConnector needs the settings that --plugin deltamem makes; pass that instead")
        install()
        adapter = load_adapter(settings.adapter, backbone_shape(vllm_config))
        layer_ids = sorted(adapter.layers)
        shape = adapter.shape
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._service: SessionService | None = None
        if role == KVConnectorRole.WORKER:
            self._worker = WorkerSide(vllm_config, settings, layer_ids)
            return
        state_shape = (len(layer_ids), shape.heads, shape.rank, shape.rank)
        self._service = SessionService(
            store_url=settings.store,
            layout=f"L{len(layer_ids)}H{shape.heads}r{shape.rank}",
            adapter=adapter.fingerprint,
            model=model_fingerprint(vllm_config),
            state_shape=state_shape,
            queue_depth=settings.queue_depth,
            queue_seconds=settings.queue_seconds,
            secret=settings.secret(),
            host_bytes=settings.host_bytes,
            write_behind=settings.write_behind,
            ttl=settings.ttl,
            audit=_audit(settings, vllm_config.parallel_config.data_parallel_index),
            layers=layer_ids,
            corrections=corrections_of(adapter),
        )
        hold(settings.control)
        address = settings.control_address(vllm_config.parallel_config.data_parallel_index)
        self._service.start(lambda service: serve(service, address))
        self._scheduler = SchedulerSide(
            self._service,
            _page_group(kv_cache_config),
            vllm_config.cache_config.block_size,
            state_shape,
            settings.session_slots,
        )

    def count_error(self) -> None:
        """A hook has failed."""
        if self._service is not None:
            self._service.meters.add(metrics.HOOK_ERRORS)
        if self._worker is not None:
            self._worker.hook_errors += 1

    # ------------------------------------------------------------------ scheduler

    @_guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        self._scheduler_side.arrive(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False  # what a session brings lies before its first token, not in place of tokens

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        return

    @_guarded(Step)
    def build_connector_meta(self, scheduler_output: Any) -> Step:
        return self._scheduler_side.plan_step(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._finish(request, block_ids), None

    @_guarded(lambda: False)
    def _finish(self, request: Any, block_ids: tuple[list[int], ...]) -> bool:
        side = self._scheduler_side
        return side.finish(request, block_ids[side.group] if len(block_ids) > side.group else [])

    @_guarded(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        answer = connector_output.kv_connector_worker_meta
        if isinstance(answer, Answer):
            self._scheduler_side.receive(answer)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy

    @property
    def _scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    # ------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        self._worker.bind()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        # The one hook that runs before the forward pass of every step in both model runners.
        super().bind_connector_metadata(connector_metadata)
        self._carry_out(connector_metadata)

    @_guarded(lambda: None)
    def _carry_out(self, step: Any) -> None:
        assert self._worker is not None
        if not step.empty:
            self._worker.carry_out(step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        return self._worker.take_done(), None

    def build_connector_worker_meta(self) -> Answer | None:
        assert self._worker is not None
        return self._worker.take_answer()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    # ------------------------------------------------------------------ both

    def shutdown(self) -> None:
        if self._service is not None:
            self._service.close()


def _page_group(kv_cache_config: KVCacheConfig) -> int:
    groups = kv_cache_config.kv_cache_groups
    found = [i for i, group in enumerate(groups) if any(n.endswith(f".{SUFFIX}") for n in group.layer_names)]
    if len(groups) == 1:
        return 0
    if len(found) != 1:
        raise ConfigError(
            f"the state pages lie in {len(found)} of {len(groups)} KV-cache groups; δ-mem needs them in exactly one: "
            "a backbone that mixes kinds of attention is not supported yet"
        )
    return found[0]
