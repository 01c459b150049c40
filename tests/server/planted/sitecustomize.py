"""Bugs planted on purpose in every process of a server: campaigns that do not see them show nothing.

``DELTAMEM_TEST_PLANT=tenants``: the tenant is left out of a session's key, and out of the salt of prompts without a
session. ``ids``: ids are passed on to the engine, and log lines are not redacted.
"""

import os
from typing import Any

from tests.engine.after_import import after_import


def _one_key(protocol: Any) -> None:
    check = protocol.SessionKey.__post_init__

    def forget_the_tenant(self: Any) -> None:
        check(self)
        object.__setattr__(self, "tenant", "everybody")

    protocol.SessionKey.__post_init__ = forget_the_tenant


def _one_salt(names: Any) -> None:
    salt = names.Names.salt

    def without_the_tenant(self: Any, kind: str, *parts: str) -> str:
        return str(salt(self, kind, *(parts if kind == "session" else parts[1:])))

    names.Names.salt = without_the_tenant


def _plain_ids(names: Any) -> None:
    names.Names.session = lambda self, tenant, session: session


def _plain_logs(redaction: Any) -> None:
    redaction.install = lambda context=None: None


PLANTS = {
    "tenants": (("deltamem_vllm.store.protocol", _one_key), ("deltamem_vllm.names", _one_salt)),
    "ids": (("deltamem_vllm.names", _plain_ids), ("deltamem_vllm.redaction", _plain_logs)),
}
for _plant in filter(None, os.environ["DELTAMEM_TEST_PLANT"].split(",")):
    for _module, _change in PLANTS[_plant]:
        after_import(_module, _change)
