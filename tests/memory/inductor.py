"""What Inductor writes for a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.graph import GraphLowering


def code_of(function: Callable[..., Any], arguments: Sequence[Any], many: Sequence[Tensor], results: int) -> str:
    """The code for a function that is called with these arguments; nothing is run.

    Args:
        many: those of the arguments that have any number of rows.
        results: tensors that the function's graph returns.
    """
    for tensor in many:
        torch._dynamo.mark_dynamic(tensor, 0)
    code = []

    def write(graph: GraphLowering) -> SimpleNamespace:
        code.append(graph.codegen()[0].value)
        return SimpleNamespace(call=lambda _: [torch.empty(4, 1)] * results)

    torch._dynamo.reset()
    with (
        config.patch(force_disable_caches=True),
        mock.patch.object(GraphLowering, "compile_to_module", write),
        torch.no_grad(),
    ):
        torch.compile(function, fullgraph=True)(*arguments)
    return "".join(code)
