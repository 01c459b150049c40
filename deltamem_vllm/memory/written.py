"""What Inductor writes for a layer that makes its rows itself: vLLM's own product, and a call past torch's dispatcher.

In the graph both are one operator, ``deltamem::project_next``. Whatever `deltamem_vllm.ops.direct` leaves to its caller
is checked here, once, where the graph is compiled; a call for which it does not hold stays the operator's.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from deltamem_vllm.ops import direct

logger = logging.getLogger("vllm.deltamem")
_MODULE = "deltamem_direct"
CALL = f"{_MODULE}.next_layer"
"""`direct.next_layer`, as what is written names it."""
_TERMS = 2
"""Of a residual's sum, by which the memory of a graph may grow; see `_keep_free_buffers`."""


def project_next(node: Any, writeline: Callable[[str], None]) -> None:
    """Write one call.

    Args:
        node: Inductor's ``FallbackKernel``.
        writeline: takes a line of Python.
    """
    arguments = [*node.codegen_args(), *node.codegen_kwargs()]
    lines = [f"torch.ops.deltamem.project_next.default({', '.join(arguments)})"]
    try:
        lines = _direct(node, arguments) or lines
    except Exception:  # the operator does the same, and an engine that cannot compile its model does not start
        logger.warning(
            "deltamem: layers are called through torch's dispatcher, which takes longer and changes no answer, because "
            "this torch describes a call in another way than 2.13; report it",
            exc_info=True,
        )
    for line in lines:
        writeline(line)


def _direct(node: Any, arguments: list[str]) -> list[str]:
    """Both calls; none unless rows, reads and the residual are whole buffers of a CPU, contiguous, with as many rows,
    and columns that the graph knows."""
    from torch._inductor.virtualized import V

    (rows, reads, residual, *_), _ = node.unflatten_args(node.inputs, node.constant_args)
    out, read, added_to, hidden, bias, handler, place = arguments
    count, dtype = rows.get_size()[0], rows.get_dtype()
    if dtype not in direct.DTYPES:
        return []
    own = _known(out, rows, count, dtype)
    kept, around = _known(read, reads, count, torch.float32), _known(added_to, residual, count, dtype)
    if own is None or kept is None or around is None:
        return []
    if residual is not None:
        _keep_free_buffers(residual)
    V.graph.wrapper_code.add_import_once(f"import {direct.__name__} as {_MODULE}")
    # The count under the name with which room for the rows was made: asking the tensor is one more call, whose code
    # comes from memory.
    (out, columns), rows = own, V.graph.wrapper_code.codegen_python_sizevar(count)
    written = [out, rows, columns, str(direct.DTYPES[dtype]), *kept, *around, place]
    return [
        f"torch.ops._C.onednn_mm.default({out}, {hidden}, {bias}, {handler})",
        f"{CALL}({', '.join(written)})",
    ]


def _keep_free_buffers(residual: Any) -> None:
    """Let a graph give buffers that are free to those that come, as the graph of the same model without memory does.

    Inductor does so only where that does not raise the graph's peak. Without a memory the residual is a sum of up to
    four terms, which live until its fourth layer: there is the peak, and elsewhere is room. With one it is a single
    buffer, all layers are alike, and most buffers of each would be made anew, a call of torch for each. So the peak may
    rise by two of the terms that are not there.
    """
    from torch._inductor.virtualized import V

    wrapper: Any = V.graph.wrapper_code
    plan = wrapper.memory_plan_reuse
    if getattr(plan, "__func__", plan) is not type(wrapper).memory_plan_reuse:
        return  # another layer of this graph has done so
    rows, columns = residual.get_size()
    more = _TERMS * V.graph.sizevars.optimization_hint(rows * columns, fallback=0) * residual.get_dtype().itemsize

    def below_a_higher_peak() -> None:
        if (peak := getattr(wrapper, "estimate_peak", None)) is not None:
            peak.overall_peak_memory += more
        plan()

    wrapper.memory_plan_reuse = below_a_higher_peak


def _known(name: str, buffer: Any, count: Any, dtype: torch.dtype) -> tuple[str, str] | None:
    """What is written for a buffer and its columns; None: the call cannot take it."""
    from torch._inductor.virtualized import V

    if buffer is None:
        return "None", "0"
    rows, columns = buffer.get_size()
    fits = (
        name.isidentifier()
        and buffer.get_dtype() == dtype
        and buffer.get_device().type == "cpu"
        and V.graph.sizevars.statically_known_equals(count, rows)
        and columns.is_Integer
        and list(buffer.get_stride()) == [columns, 1]
    )
    return (name, str(columns)) if fits else None
