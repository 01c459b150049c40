"""Official `.pt` → `.safetensors`, beside it, same names and dtypes: nothing to unpickle on the serving
machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from deltamem_vllm.adapter.config import CONFIG_FILE, load_config
from deltamem_vllm.adapter.files import PT_FILE, SAFETENSORS_FILE, read_tensors
from deltamem_vllm.adapter.weights import load_adapter
from deltamem_vllm.errors import AdapterError


def convert_adapter(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write ``folder``'s safetensors file from its .pt; the .pt stays.

    The new file appears whole or not at all.

    Returns:
        the path of the new file.

    Raises:
        AdapterError: there is no .pt, the target exists, the adapter is not valid, or the folder is not
            writable.
    """
    folder = Path(folder)
    source, target = folder / PT_FILE, folder / SAFETENSORS_FILE
    if not source.is_file():
        raise AdapterError(f"{folder}: there is no {PT_FILE} to convert")
    if target.exists() and not overwrite:
        raise AdapterError(f"{target} exists already: delete it, or pass --overwrite")
    load_config(folder)
    tensors = {name: tensor.contiguous() for name, tensor in read_tensors(source).items()}
    try:
        # The whole folder is made beside the target, checked like any adapter, and only then is the file
        # moved.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".converting-") as scratch:
            made = Path(scratch) / SAFETENSORS_FILE
            save_file(tensors, made, metadata={"format": "pt"})
            (Path(scratch) / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
            load_adapter(scratch)
            made.chmod(0o644)
            made.replace(target)
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{target}: cannot be written: {error}") from error
    return target
