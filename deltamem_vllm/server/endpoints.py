"""vLLM's endpoint plugin: our middleware and the routes under ``/v1/sessions``."""

import asyncio
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from typing import Any

from fastapi import FastAPI

from deltamem_vllm import redaction
from deltamem_vllm.compat import (
    api_keys,
    before_shutdown,
    end_requests_with_their_engine,
    on_request_span,
    outermost,
    wake_engine,
)
from deltamem_vllm.config import PLUGIN, Settings, settings_of
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.names import Names
from deltamem_vllm.policy import parse_policy
from deltamem_vllm.server import elision
from deltamem_vllm.server.chat import ChatPrompts
from deltamem_vllm.server.drain import Drain
from deltamem_vllm.server.fact_routes import make_fact_router
from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.metrics_page import MetricsPage
from deltamem_vllm.server.middleware import SessionMiddleware
from deltamem_vllm.server.named import noting_session
from deltamem_vllm.server.offering import Offering
from deltamem_vllm.server.page import PAGE_ID, Page
from deltamem_vllm.server.routes import make_router
from deltamem_vllm.server.scope import current
from deltamem_vllm.server.spans import RequestSpans
from deltamem_vllm.server.tenants import FileKeys, OneTenant, ServerKeys, Tenants
from deltamem_vllm.sessions.control import ControlClient


class DeltaMemEndpoints:
    """Entry point ``vllm.endpoint_plugins``."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and, innermost (inside authentication), the middleware."""
        settings = settings_of(app.state.args)
        app.state.deltamem_tenants = tenants = _tenants(settings, app.state.args)
        app.state.deltamem_drain = drain = Drain()
        app.add_middleware(MetricsPage)
        page = settings is not None and settings.ui
        app.add_middleware(
            SessionMiddleware,
            session_header=settings.session_header if settings else "X-Session-ID",
            tenants=tenants,
            drain=drain,
            reserved=frozenset({PAGE_ID} if page else ()),
        )
        if page:
            outermost(app, Page)
        if settings is not None:
            redaction.install(partial(_log_context, Names(settings.secret())))
        app.include_router(make_router())
        app.include_router(make_fact_router())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Connect to the engines' session services and put the gateway in front of the engine."""
        settings = settings_of(engine_client.vllm_config)
        if settings is None:
            raise ConfigError(
                "the deltamem endpoint plugin runs only with --plugin deltamem: add it, or take deltamem "
                "out of VLLM_PLUGINS"
            )
        ranks = engine_client.vllm_config.parallel_config.data_parallel_size
        addresses = [settings.control_address(rank) for rank in range(ranks)]
        clients = [ControlClient(address, lambda: engine_client.errored) for address in addresses]
        wake, policy = partial(wake_engine, engine_client), parse_policy(settings.write)
        names = Names(settings.secret())
        spans = RequestSpans()
        on_request_span(spans.hold)
        state.deltamem = gateway = Gateway(clients, settings.queue_seconds, names, wake, policy, spans)
        renderer = engine_client.renderer
        history = elision.Policy(settings.history == "elide", settings.history_keep)
        offering = Offering(settings.facts_chars, settings.facts_block, renderer)
        prompts = ChatPrompts(policy, history, gateway.recall, offering)
        renderer.render_chat_async = prompts.wrap(renderer.render_chat_async)
        online = state.online_renderer
        online.preprocess_chat = noting_session(online.preprocess_chat)
        engine_client.generate = gateway.wrap(engine_client.generate)
        before_shutdown(engine_client, state.deltamem_drain.finish)
        state.deltamem_watch = asyncio.ensure_future(end_requests_with_their_engine(engine_client))
        if isinstance(state.deltamem_tenants, FileKeys):
            state.deltamem_keys = asyncio.ensure_future(state.deltamem_tenants.watch())  # kept, else it is collected


def _tenants(settings: Settings | None, args: Namespace) -> Tenants:
    """Who knows this server's tenants: the key file, vLLM's own keys, or nobody."""
    if settings is not None and settings.key_file:
        return FileKeys(settings.key_file)
    keys = api_keys(args)
    return ServerKeys(keys) if keys else OneTenant()


def _log_context(names: Names) -> tuple[redaction.Label | None, Iterable[str]]:
    """How log lines of the request that is being served call its sessions."""
    scope = current.get()
    if scope is None:
        return None, ()
    return (partial(names.label, scope.tenant.name) if scope.tenant is not None else None), scope.ids
