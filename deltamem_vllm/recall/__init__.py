"""A small model, trained from nothing, that recalls told facts from its δ-mem state."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
ADAPTER_DIR = Path(__file__).parent / "adapter"

__all__ = ["ADAPTER_DIR", "MODEL_DIR"]
