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
    V.graph.wrapper_code.add_import_once(f"import {direct.__name__} as {_MODULE}")
    # The count under the name with which room for the rows was made: asking the tensor is one more call, whose code
    # comes from memory.
    (address, columns), rows = own, V.graph.wrapper_code.codegen_python_sizevar(count)
    written = [address, rows, columns, str(direct.DTYPES[dtype]), *kept, *around, place]
    return [
        f"torch.ops._C.onednn_mm.default({out}, {hidden}, {bias}, {handler})",
        f"{CALL}({', '.join(written)})",
    ]


def _known(name: str, buffer: Any, count: Any, dtype: torch.dtype) -> tuple[str, str] | None:
    """What is written for a buffer's address and columns, zeros for none; None: the call cannot take it."""
    from torch._inductor.virtualized import V

    if buffer is None:
        return "0", "0"
    rows, columns = buffer.get_size()
    fits = (
        name.isidentifier()
        and buffer.get_dtype() == dtype
        and buffer.get_device().type == "cpu"
        and V.graph.sizevars.statically_known_equals(count, rows)
        and columns.is_Integer
        and list(buffer.get_stride()) == [columns, 1]
    )
    return (f"{name}.data_ptr()", str(columns)) if fits else None
