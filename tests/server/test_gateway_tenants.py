"""The gateway between tenants: what the engine is told of whom, and quotas."""

import re
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.scope import Scope
from deltamem_vllm.server.tenants import Tenant
from tests.server.test_gateway import NAMES, PROMPT, Engine, play, send


def test_the_engine_knows_a_session_by_its_keyed_name_only(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        seen = []
        for tenant in ("a", "b"):
            for mode in ("readwrite", "read", "off"):
                scope = Scope(tenant=Tenant(tenant), mode=mode, header_id="mia")  # type: ignore[arg-type]
                await send(gateway, engine, "mia", scope, extra_args={"session_id": "mia", "theirs": 1})
                prompt, params, _, kwargs = engine.calls[-1]
                assert "mia" not in f"{prompt} {params} {kwargs}"
                assert params.extra_args["theirs"] == 1
                seen.append((kwargs.get("session_id"), prompt["cache_salt"]))
        names = [name for name, _ in seen]
        assert names == [NAMES.session("a", "mia")] * 2 + [None] + [NAMES.session("b", "mia")] * 2 + [None]
        assert len({salt for _, salt in seen}) == 6

    play(tmp_path, scenario)


def test_tenants_without_a_session_share_no_salt_and_one_alone_has_none(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        async def salt(tenant: str | None, **prompt: Any) -> str | None:
            scope = Scope(tenant=Tenant(tenant) if tenant else None)
            await send(gateway, engine, None, scope, {**PROMPT, **prompt})
            return engine.calls[-1][0].get("cache_salt")  # type: ignore[no-any-return]

        salts = [await salt(t, **s) for t in ("a", "b", None) for s in ({}, {"cache_salt": "x"}, {"cache_salt": "y"})]
        assert len(set(salts)) == 9
        assert await salt("a") == salts[0]
        assert await salt("default") is None, "the only tenant of a server without keys runs as in vLLM"
        assert await salt("default", cache_salt="x") not in (None, "x", *salts)

    play(tmp_path, scenario)


def test_tenants_have_sessions_of_their_own(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        for tenant, versions in (("a", 3), ("b", 1)):
            for version in range(1, versions + 1):
                scope = await send(gateway, engine, scope=Scope(tenant=Tenant(tenant)))
                assert (scope.outcome["status"], scope.outcome["version"]) == ("committed", version)

    play(tmp_path, scenario)


def test_different_ids_are_refused_and_not_shown_to_vllm(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        for mode in ("readwrite", "read", "off"):
            scope = Scope(mode=mode, header_id="mia")  # type: ignore[arg-type]
            scope.ids.add("mia")
            with pytest.raises(VLLMValidationError, match="different sessions") as e:
                await send(gateway, engine, "tom", scope, extra_args={"session_id": "eva"})
            assert not {"mia", "tom", "eva"} & set(re.findall("[a-z]+", str(e.value))), "vLLM logs what it is told"
            assert all(name in str(scope.failure) for name in ("'mia'", "'tom'", "'eva'"))
        assert not engine.calls

    play(tmp_path, scenario)


def test_a_quota_counts_writes_of_all_of_a_tenants_sessions(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        tenant = Tenant("a", commits_per_minute=2)
        for session in ("s", "t"):
            await send(gateway, engine, session, Scope(tenant=tenant))
        scope = Scope(tenant=tenant)
        with pytest.raises(VLLMValidationError, match="2 writing requests per minute"):
            await send(gateway, engine, "u", scope)
        assert (getattr(scope.failure, "status", 0), getattr(scope.failure, "retry_after", 0)) == (429, 30)
        await send(gateway, engine, "s", Scope(tenant=tenant, mode="read"))
        await send(gateway, engine, None, Scope(tenant=tenant))
        await send(gateway, engine, "s", Scope(tenant=Tenant("b", commits_per_minute=2)))

    play(tmp_path, scenario)
