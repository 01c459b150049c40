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
    """Both calls; none unless rows and reads are whole buffers of a CPU, contiguous, with as many rows, and columns
    that the graph knows."""
    from torch._inductor.virtualized import V

    (rows, reads, *_), _ = node.unflatten_args(node.inputs, node.constant_args)
    out, read, hidden, bias, handler, place = arguments
    (count, columns), (others, width) = rows.get_size(), reads.get_size()
    if not (
        out.isidentifier()
        and read.isidentifier()
        and rows.get_dtype() in direct.DTYPES
        and reads.get_dtype() == torch.float32
        and rows.get_device().type == reads.get_device().type == "cpu"
        and V.graph.sizevars.statically_known_equals(count, others)
        and columns.is_Integer
        and width.is_Integer
        and list(rows.get_stride()) == [columns, 1]
        and list(reads.get_stride()) == [width, 1]
    ):
        return []
    V.graph.wrapper_code.add_import_once(f"import {direct.__name__} as {_MODULE}")
    # The count under the name with which room for the rows was made: asking the tensor is one more call, whose code
    # comes from memory.
    shape = f"{V.graph.wrapper_code.codegen_python_sizevar(count)}, {columns}, {direct.DTYPES[rows.get_dtype()]}"
    return [
        f"torch.ops._C.onednn_mm.default({out}, {hidden}, {bias}, {handler})",
        f"{CALL}({out}.data_ptr(), {shape}, {read}.data_ptr(), {width}, {place})",
    ]
