"""Bugs planted on purpose, in every process of an engine: a suite that does not see them shows nothing.

``DELTAMEM_TEST_PLANT`` names one. ``one-salt``: all sessions share one prefix-cache salt. ``no-base``: the salt names
the session, but not the memory that it starts from.
"""

import os
from typing import Any

from tests.engine.after_import import after_import


def _plant(service: Any) -> None:
    original = service.cache_salt

    def one_salt(*args: Any) -> str:
        return "deltamem"

    def no_base(key: Any, incarnation: str, base_digest: str, *rest: Any) -> str:
        return str(original(key, incarnation, "", *rest))

    service.cache_salt = {"one-salt": one_salt, "no-base": no_base}[os.environ["DELTAMEM_TEST_PLANT"]]


after_import("deltamem_vllm.sessions.service", _plant)
