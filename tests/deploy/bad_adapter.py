"""An adapter with all that can be wrong with one."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.engine.random_adapter import write_adapter

KEYS, CORRECTIONS = 5.0, 1e-6
"""What its keys and its corrections are multiplied by."""
FEW, MANY = 2, 60
"""Tokens of a new session whose memory corrects nothing; has grown out of proportion, and is often not finite."""


def write_bad_adapter(folder: Path) -> Path:
    """Its keys are long and not normalised, so that many tokens multiply a state by much; its corrections are a million
    times too small. So a short session's memory does nothing, and a long one's often overflows.

    Returns:
        the folder.
    """
    write_adapter(folder, {"normalize_qk": False, "delta_heads": ["o"]})
    path = folder / "delta_mem_adapter.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith("memory_k_proj"):
            weights[name] *= KEYS
        if name.endswith("delta_o_proj"):
            weights[name] *= CORRECTIONS
    save_file(weights, path)
    return folder
