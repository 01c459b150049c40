"""Every touch on vLLM internals that may move. Each names its pin and its end.

Hooks are probed by signature, never by version number; a missing one is a clear ``ConfigError`` at start.
"""

import asyncio
import contextvars
import functools
import importlib
import inspect
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from deltamem_vllm.errors import ConfigError

_MARK = "_deltamem_wrapped"


def _found(owner: Any, name: str) -> Any:
    """``owner.name``.

    Raises:
        ConfigError: this vLLM has none.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ConfigError(
            f"this vLLM has no {getattr(owner, '__name__', owner)}.{name}: deltamem_vllm needs vLLM 0.32; "
            "install that version, or a deltamem-vllm made for yours"
        ) from None


def _wrap(owner: Any, name: str, make: Callable[[Any], Any], *, static: bool = False) -> None:
    """Replace ``owner.name`` by ``make(original)`` once; a second call does nothing."""
    original = _found(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, staticmethod(replacement) if static else replacement)


def on_cli_args(extend: Callable[[Any], None]) -> None:
    """Call ``extend(parser)`` whenever vLLM builds its engine arguments.

    vllm 0.32: ``EngineArgs.add_cli_args``; until vLLM offers plugins a way to declare flags.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Any) -> Any:
        def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
            parser = original(parser, *args, **kwargs)
            extend(parser)
            return parser

        return add_cli_args

    _wrap(EngineArgs, "add_cli_args", make, static=True)


def on_engine_config(check: Callable[[Any], None]) -> None:
    """Call ``check(vllm_config)`` once vLLM has made its configuration, before any process starts.

    vllm 0.32: ``EngineArgs.create_engine_config``; until general plugins may validate a configuration.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Any) -> Any:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            check(vllm_config)
            return vllm_config

        return create_engine_config

    _wrap(EngineArgs, "create_engine_config", make)


def on_model_built(attach: Callable[[Any, Any], None]) -> None:
    """Call ``attach(model, vllm_config)`` after the target model's modules exist and before its weights load.

    Draft models of speculative decoding are left alone.
    vllm 0.32: ``initialize_model`` as imported by each loader; until vLLM has a hook for wrapping modules.
    """
    utils: Any = importlib.import_module("vllm.model_executor.model_loader.utils")
    original = utils.initialize_model
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialize_model(vllm_config: Any, *, prefix: str = "", model_config: Any = None, **kwargs: Any) -> Any:
        model = original(vllm_config=vllm_config, prefix=prefix, model_config=model_config, **kwargs)
        if not prefix and not _is_draft(vllm_config, model_config):
            attach(model, vllm_config)
        return model

    setattr(initialize_model, _MARK, True)
    utils.initialize_model = initialize_model
    for loader in ("base_loader", "tensorizer_loader", "weight_cache.ipc_loader"):
        try:
            module = importlib.import_module(f"vllm.model_executor.model_loader.{loader}")
        except ImportError:  # an optional loader whose own dependency is not installed
            continue
        if getattr(module, "initialize_model", None) is original:
            module.initialize_model = initialize_model  # type: ignore[attr-defined]


def _is_draft(vllm_config: Any, model_config: Any) -> bool:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return False
    draft = getattr(speculative, "draft_model_config", None)
    building = model_config if model_config is not None else vllm_config.model_config
    return draft is not None and building is draft and draft is not getattr(speculative, "target_model_config", None)


def split_graph_at(op: str) -> None:
    """Have piecewise compilation split the graph at a custom op, as it does at attention.

    vllm 0.32: ``CompilationConfig._attention_ops``; until out-of-tree attention ops can register.
    """
    from vllm.config import CompilationConfig

    ops: list[str] = _found(CompilationConfig, "_attention_ops")
    if op not in ops:
        ops.append(op)


def register_connector(name: str, module: str) -> None:
    """Make a connector known by name; ``MultiConnector`` looks its parts up there."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, module, name)


def hash_blocks_with(spans_of: Callable[[Any], Any], hash_blocks: Callable[..., list[bytes]]) -> None:
    """Hash the blocks of a request for which ``spans_of(request)`` is not empty by
    ``hash_blocks(request, spans, block_size, hasher, fold)``.

    vllm 0.32: ``get_request_block_hasher`` as imported by the engine core, which calls it where requests arrive and not
    on the scheduling thread; until a request can name extra keys per block.
    """
    core: Any = importlib.import_module("vllm.v1.engine.core")

    def make(original: Any) -> Any:
        def get_request_block_hasher(hash_block_size: int, caching_hash_fn: Callable[[Any], bytes]) -> Any:
            hasher = original(hash_block_size, caching_hash_fn)

            def block_hasher(request: Any) -> list[bytes]:
                if (len(request.block_hashes) + 1) * hash_block_size > request.num_tokens:
                    return []  # no new full block, as after most tokens: the original would say so, too
                spans = spans_of(request)
                if not spans:
                    return hasher(request)  # type: ignore[no-any-return]
                return hash_blocks(request, spans, hash_block_size, hasher, caching_hash_fn)

            return block_hasher

        return get_request_block_hasher

    _wrap(core, "get_request_block_hasher", make)


def skip_layer_transfers() -> None:
    """Have attention layers pass by a connector whose attribute ``transfers_no_layers`` is true.

    Else each layer of each step is looked up before vLLM asks whether its keys and values are to be transferred.

    vllm 0.32: ``has_kv_transfer_group`` as imported by the decorator ``maybe_transfer_kv_layer``, and the variable
    that it looks at; until a connector can say so.
    """
    module: Any = importlib.import_module("vllm.model_executor.layers.attention.kv_transfer_utils")
    state: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_transfer_state")
    _found(state, "_KV_CONNECTOR_AGENT")

    def make(original: Any) -> Any:
        def has_kv_transfer_group() -> bool:
            return not getattr(state._KV_CONNECTOR_AGENT, "transfers_no_layers", False) and original()

        return has_kv_transfer_group

    _wrap(module, "has_kv_transfer_group", make)


def on_request_span(hold: Callable[[Any, Callable[[dict[str, Any]], None]], bool]) -> None:
    """Hand the span of every finished request to ``hold(request id, emit)`` first; where that is false it is
    sent at once. ``emit(attributes)`` sends it with further attributes, in the context and with the times that it had.

    vllm 0.32: ``instrument_manual`` as imported by the output processor, which calls it where an endpoint for traces is
    set; until the span of a request can be given attributes.
    """
    module: Any = importlib.import_module("vllm.v1.engine.output_processor")

    def make(original: Any) -> Any:
        def instrument_manual(
            span_name: str,
            start_time: int,
            end_time: int | None = None,
            attributes: dict[str, Any] | None = None,
            context: Any = None,
            kind: Any = None,
        ) -> None:
            own, ended, here = dict(attributes or {}), end_time or time.time_ns(), contextvars.copy_context()

            def emit(more: dict[str, Any]) -> None:
                here.run(original, span_name, start_time, ended, {**own, **more}, context, kind)

            if not hold(own.get(module.SpanAttributes.GEN_AI_REQUEST_ID), emit):
                emit({})

        return instrument_manual

    _wrap(module, "instrument_manual", make)


def api_keys(args: Any) -> list[str]:
    """The API keys that vLLM asks for; empty for a server without keys.

    vllm 0.32: ``init_entrypoints_middleware`` takes them so; until the application knows its keys.
    """
    from vllm import envs

    return [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]


def is_beam(request_id: str) -> bool:
    """Whether an engine call is one step of one beam of a beam search.

    vllm 0.32: ``BeamSearchOnlineMixin.beam_search`` names them so; until an engine call says what it is part of.
    """
    return re.search(r"-beam-\d+$", request_id) is not None


def cache_dtype(vllm_config: Any) -> Any:
    """dtype of attention's KV cache; a page of another dtype would turn on zeroing of every new block."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    return kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)


def cache_quant_mode(vllm_config: Any) -> Any:
    """Quantisation mode of attention's KV cache, which a page in its group must share."""
    from vllm.v1.kv_cache_interface import get_kv_quant_mode

    return get_kv_quant_mode(vllm_config.cache_config.cache_dtype)


def onednn_product(linear: Any) -> tuple[torch.Tensor, int] | None:
    """What ``torch.ops._C.onednn_mm`` takes for an unquantised linear on a CPU, and how many columns it puts out; None
    where vLLM computes this linear in another way.

    vllm 0.32: a handler in the closure ``cpu_linear``, made once the weights are loaded; until a linear can be asked.
    """
    from vllm._custom_ops import CPUDNNLGEMMHandler

    call = getattr(linear, "cpu_linear", None)
    for found in inspect.getclosurevars(call).nonlocals.values() if inspect.isfunction(call) else ():
        if isinstance(found, CPUDNNLGEMMHandler) and found.handler_tensor is not None:
            return found.handler_tensor, found.n
    return None


def write_calls(op: str, write: Callable[[Any, Callable[[str], None]], None]) -> None:
    """Have Inductor write calls of a custom operator by ``write(node, writeline)``, in the Python that it makes of a
    graph. Where it cannot be told, it writes calls of the operator.

    torch 2.13: a registry that is documented in its module and in no manual; until an operator can bring its own.
    """
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:
        return
    CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=write)


def require_hooks() -> None:
    """Refuse a vLLM that lacks a hook we stand on, before it fails in the middle of a request.

    Raises:
        ConfigError: names the missing hook.
    """
    from vllm import __version__ as version
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.request import Request

    wanted = {
        "KVConnectorBase_V1.build_connector_worker_meta": hasattr(KVConnectorBase_V1, "build_connector_worker_meta"),
        "KVConnectorBase_V1.on_new_request": hasattr(KVConnectorBase_V1, "on_new_request"),
        "Request(session_id)": "session_id" in inspect.signature(Request.__init__).parameters,
        "FullAttentionSpec(state_content_bytes)": "state_content_bytes" in FullAttentionSpec.__dataclass_fields__,
    }
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise ConfigError(
            f"vLLM {version} lacks {', '.join(missing)}: deltamem_vllm needs vLLM 0.32; install that version, or a "
            "deltamem-vllm made for yours"
        )


async def wake_engine(engine_client: Any) -> None:
    """Make an idle engine look for work: it waits for messages, and any makes it ask the connector too.

    vllm 0.32, `EngineCoreProc._process_input_queue`; until a connector can wake its engine.
    """
    await engine_client.is_sleeping()


async def end_requests_with_their_engine(engine_client: Any, seconds: float = 0.5) -> None:
    """Tell waiting requests once the engine is gone; runs until then.

    vllm 0.32, `AsyncLLM.shutdown` cancels the task that hands out outputs without a word to the requests that wait for
    some, which keeps the server from ending; until it tells them.
    """
    while not engine_client.errored:
        await asyncio.sleep(seconds)
    engine_client.output_processor.propagate_error(engine_client.dead_error)


def outermost(app: Any, middleware: Callable[[Any], Any]) -> None:
    """Put an ASGI middleware around all others of an application, vLLM's authentication included.

    vllm 0.32: ``build_app`` puts its own middlewares around those of endpoint plugins; until these may say where theirs
    belong.
    """
    _wrap(app, "build_middleware_stack", lambda build: lambda: middleware(build()))


def before_shutdown(engine_client: Any, finish: Callable[[float, Callable[[], None]], float]) -> None:
    """Call ``finish(seconds, abort)`` before the engines are asked to end, on another thread than the event loop's.

    Args:
        engine_client: vLLM's, whose event loop is the running one.
        finish: gets the seconds of ``--shutdown-timeout`` and what ends all running requests of this API process;
            returns the seconds that are left to the engines.

    vllm 0.32: ``serve_http`` calls ``AsyncLLM.shutdown`` on a thread when it is signalled, and again on the event loop
    when that has ended; until plugins are told of a shutdown. Without a timeout nothing is waited for.
    """
    loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()
    shutdown = engine_client.shutdown

    async def abort_all() -> None:
        await engine_client.abort(list(engine_client.output_processor.request_states), internal=True)

    def abort() -> None:
        asyncio.run_coroutine_threadsafe(abort_all(), loop)

    def finish_first(timeout: float | None = None) -> None:
        if timeout and threading.get_ident() != loop_thread:
            timeout = finish(timeout, abort)
        shutdown(timeout=timeout)

    engine_client.shutdown = finish_first
