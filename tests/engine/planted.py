"""Bugs planted on purpose, in the process of an inline engine: a suite that does not see them shows nothing."""

from __future__ import annotations

from typing import Any


def plant(name: str) -> None:
    """Plant one bug by name.

    ``one-salt``: every session shares one prefix-cache salt.
    ``no-base``: the salt names the session but not the memory it starts from.
    """
    from deltamem_vllm.sessions import grants, service

    original = grants.cache_salt

    def one_salt(*args: Any) -> str:
        return "deltamem"

    def no_base(key: Any, incarnation: str, base_digest: str, limit: int, adapter: str, clients: str | None) -> str:
        return original(key, incarnation, "", limit, adapter, clients)

    service.cache_salt = {"one-salt": one_salt, "no-base": no_base}[name]  # type: ignore[attr-defined]
