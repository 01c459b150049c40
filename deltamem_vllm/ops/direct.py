"""One layer of a decode step as a plain call of the native library, past torch's dispatcher.

Between two layers a model's weights go through the caches. What torch does on the way from a graph's line to an
operator (schemas, boxes, handles) then comes from memory again: `loadtests.decode` measures both ways beside each
other. The call is a function of an extension module, ``_direct.so``; where that was not built or does not load, it goes
through ctypes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""By dtype of rows, its number (`Dtype` in csrc/cpu/delta_rule.h)."""
EXTENSION = "_direct.so"

NextLayer = Callable[[Tensor, int, int, int, Tensor | None, int, Tensor | None, int, int], None]


def _not_loaded(*_: Any) -> None:
    raise RuntimeError("the native library is not loaded: make a NativeOps first")


next_layer: NextLayer = _not_loaded
"""``(rows, count, columns, dtype, reads, width, residual, hidden, place)``: `NativeOps.scan_next` of rows [count,
columns], of a dtype of `DTYPES`, reads [count, width] fp32, and a residual [count, hidden] of the rows' dtype; None
has 0 columns. All are contiguous and of a CPU, and the numbers are theirs: whoever calls has seen to that. Raises
``RuntimeError`` as `NativeOps.scan_next` does."""


def bind(library: Path) -> None:
    """Have `next_layer` call a library that is loaded."""
    global next_layer
    function = ctypes.CDLL(str(library)).deltamem_next
    next_layer = by_extension(library.with_name(EXTENSION), function) or by_ctypes(function)


def by_extension(path: Path, function: Any) -> NextLayer | None:
    """`next_layer` of the extension module at ``path``; None where there is none that this Python loads, or this torch
    does not tell kernels how to find a tensor's data."""
    data = getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None)
    if data is None:
        return None
    name = f"{__package__}._direct"
    spec = spec_from_loader(name, ExtensionFileLoader(name, str(path)))
    assert spec is not None
    try:
        module = module_from_spec(spec)
    except ImportError:
        return None
    module.bind(ctypes.cast(function, ctypes.c_void_p).value, data)
    found: NextLayer = module.next_layer
    return found


def by_ctypes(function: Any) -> NextLayer:
    """`next_layer` without an extension module."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, number, number, number, pointer, number, pointer, number, number)
    function.restype = ctypes.c_char_p

    def call(
        rows: Tensor, count: int, columns: int, dtype: int, reads: Tensor | None, width: int, residual: Tensor | None,
        hidden: int, place: int,
    ) -> None:  # fmt: skip
        kept, added_to = (0 if each is None else each.data_ptr() for each in (reads, residual))
        wrong: bytes | None = function(rows.data_ptr(), count, columns, dtype, kept, width, added_to, hidden, place)
        if wrong is not None:
            raise RuntimeError(wrong.decode())

    return call
