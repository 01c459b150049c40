"""The tensor file of an adapter folder, read without trusting it.

Official folders hold `delta_mem_adapter.pt`; `.safetensors` with the same names is ours, and preferred where
both exist. A `.pt` is a pickle in a ZIP file: it is read with torch's restricted unpickler, and only after
its size, its members and the absence of compression have been checked, so that it cannot unpack into more
than it weighs.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deltamem_vllm.errors import AdapterError

PT_FILE = "delta_mem_adapter.pt"
SAFETENSORS_FILE = "delta_mem_adapter.safetensors"

#: Without a backbone to compare with, no adapter is larger than this.
MAX_FILE_BYTES = 4 << 30
#: A pickle that only names tensors is small: about 200 bytes for each.
MAX_PICKLE_BYTES = 16 << 20


def find_tensor_file(folder: Path) -> Path:
    """The tensor file of an adapter folder.

    Raises:
        AdapterError: not a folder, or neither file is in it.
    """
    if not folder.exists():
        raise AdapterError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise AdapterError(f"{folder}: expected the adapter's folder, got a file; give {folder.parent}")
    for name in (SAFETENSORS_FILE, PT_FILE):
        if (path := folder / name).is_file():
            return path
    raise AdapterError(f"{folder}: holds neither {SAFETENSORS_FILE} nor {PT_FILE}")


def read_tensors(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Tensor]:
    """All tensors of the file, on the CPU, in the file's dtypes.

    Args:
        max_bytes: refuse a larger file before reading any of it.

    Raises:
        AdapterError: the file is too large, damaged, or holds anything but a flat dict of plain tensors.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise AdapterError(
            f"{path}: {size} bytes, but an adapter with this config has at most {max_bytes}: "
            "it was made for another model, or it is no adapter"
        )
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors")
    # A view of a small storage can claim any size: what is claimed must be in the file.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise AdapterError(f"{path}: its tensors claim {claimed} bytes, but the file has {size}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterError(f"{path}: not a valid safetensors file: {error}") from error


def _read_pt(path: Path) -> dict[str, Tensor]:
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile bytes fail in the unpickler in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{path}: refused: {reason}") from error
    if not isinstance(loaded, dict):
        raise AdapterError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise AdapterError(f"{path}: expected names as keys, got {name!r}")
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        if not plain or value.device.type != "cpu":
            raise AdapterError(f"{path}: {name}: expected a plain CPU tensor, got {type(value).__name__}")
    return loaded


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise AdapterError(f"{path}: not a file of torch.save (since torch 1.6): damaged, or incompletely downloaded?")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise AdapterError(f"{path}: damaged: {error}") from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise AdapterError(f"{path}: member {member.filename!r} is compressed; torch.save never does so")
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise AdapterError(f"{path}: member {member.filename!r} has {member.file_size} bytes of pickle")
