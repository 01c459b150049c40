"""Requests that take their time, so that they are under way while a test does something else, however fast the machine.

A logits processor of vLLM's kind, which the tests' servers are started with: a request whose ``vllm_xargs`` have
``step_seconds`` makes each step that it is part of take that much longer.
"""

import time
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

PACE = {"step_seconds": 0.02}
"""For ``vllm_xargs``: 100 tokens take at least 2 seconds."""


class Slow(AdapterLogitsProcessor):
    """Waits, and changes nothing."""

    def is_argmax_invariant(self) -> bool:
        """False: else it would be left out with greedy sampling."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """See `AdapterLogitsProcessor`."""
        seconds = (params.extra_args or {}).get("step_seconds")
        if seconds is None:
            return None

        def wait(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            time.sleep(float(seconds))
            return logits

        return wait
