"""A bug planted on purpose: commits are told at once, and saved a second later."""

import threading
from collections.abc import Sequence
from typing import Any

from tests.engine.after_import import after_import


def _told_before_saved(postgres: Any) -> None:
    rightly = postgres.PostgresStore.put_many
    order = threading.Lock()

    def put_many(self: Any, puts: Sequence[Any]) -> list[None]:
        def later() -> None:
            with order:
                rightly(self, puts)

        threading.Timer(1.0, later).start()
        return [None] * len(puts)

    postgres.PostgresStore.put_many = put_many


after_import("deltamem_vllm.store.postgres", _told_before_saved)
