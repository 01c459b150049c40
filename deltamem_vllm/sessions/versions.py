"""The next version of a session: a record made of what a request was granted, what it was fed and where that led."""

import time
from dataclasses import dataclass

import numpy as np

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.sessions import pinning, windows
from deltamem_vllm.sessions.grants import Grant
from deltamem_vllm.sessions.histories import attributes_after
from deltamem_vllm.sessions.masks import conversation, unwritten_before
from deltamem_vllm.store import parts
from deltamem_vllm.store.protocol import Record


@dataclass(frozen=True, slots=True)
class Versions:
    """Makes the records of one engine.

    Attributes:
        layout, adapter, model: what every record says it was made with.
        state_shape: [layers, H, r, r].
    """

    layout: str
    adapter: str
    model: str
    state_shape: tuple[int, ...]

    def after(self, grant: Grant, last: Record | None, tokens_fed: list[int], state: np.ndarray) -> Record:
        """The record of a request that is over.

        Args:
            last: the session's latest record, which the request started from; None where it had none.
            tokens_fed: all tokens of the request's window that went into the memory, the prompt's first.
            state: [layers, H, r, r] fp32, after them.

        Raises:
            CorruptRecord: the state is not finite, or too large.
        """
        if (largest := parts.excess(state)) is not None:  # before the store refuses it: the store is well
            raise CorruptRecord(
                f"the state after this request is not finite, or over {parts.MAX_ABS:g}: it holds {largest:g}, and was "
                "not saved"
            )
        now = time.time()
        base = grant.base if grant.base is not None else np.zeros(self.state_shape, np.float32)
        own = conversation(tokens_fed, grant.spans, grant.offered)
        prompt_tokens = grant.prompt_tokens - unwritten_before(grant.offered, grant.prompt_tokens)
        before = last.tokens if last else 0
        if last and grant.plan.kind != "new":  # the window is written again from its base
            window = windows.unpack(last.window)
            before -= window.end.count if window is not None else 0
        return Record(
            key=grant.key,
            version=(grant.expect.version if grant.expect else 0) + 1,
            incarnation=grant.incarnation,
            request_id=grant.ticket,
            adapter=self.adapter,
            model=self.model,
            layout=self.layout,
            base=base,
            end=state,
            window=windows.pack(windows.advance(grant.plan, own, prompt_tokens)),
            created_at=last.created_at if last else now,
            updated_at=now,
            tokens=before + len(own),
            windows=(last.windows if last else 0) + (grant.plan.kind == "new"),
            attributes=pinning.renew(attributes_after(grant, last, len(tokens_fed), state), grant.pins, now),
        )
