"""Bugs planted on purpose, in every process of an engine: a suite that does not see them shows nothing.

``DELTAMEM_TEST_PLANT`` names one. ``one-salt``: all sessions share one prefix-cache salt. ``no-base``: the salt names
the session, but not the memory that it starts from. ``unmasked-hashes``: blocks are hashed without their write masks.
``sticky-marks``: a block keeps its write mask when it is handed out for other content.
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

    service.cache_salt = {"one-salt": one_salt, "no-base": no_base}[BUG]


def _ignore_masks(masks: Any) -> None:
    masks.hash_blocks = lambda request, spans, size, hasher, fold: hasher(request)


def _never_unmark(marks: Any) -> None:
    given = marks.Marks.given

    def without_clearing(self: Any, request: str, blocks: list[int], *, anew: bool) -> list[Any]:
        return [mark for mark in given(self, request, blocks, anew=anew) if mark.bits is not None]

    marks.Marks.given = without_clearing


BUG = os.environ["DELTAMEM_TEST_PLANT"]
if BUG == "unmasked-hashes":
    after_import("deltamem_vllm.sessions.masks", _ignore_masks)
elif BUG == "sticky-marks":
    after_import("deltamem_vllm.sessions.marks", _never_unmark)
else:
    after_import("deltamem_vllm.sessions.service", _plant)
