"""Where in an attention module its memory works: hooks on the linears that make q, k, v and o.

    in or after qkv_proj      reads, and corrects q, k and v (in: `memory.appended`)
    around q, k and v_proj    the first to run reads; each is corrected
    after o_proj              corrects o
    after the layer's norm    names the residual, where o is corrected there

Hooks rather than subclasses: the same few lines serve every backbone whose attention has these projections, native
or through the Transformers backend, fused or not, eager or compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltamem_vllm.adapter.config import Head
from deltamem_vllm.memory.appended import append_rows, can_append
from deltamem_vllm.memory.layer import MemoryLayer

QKV: tuple[Head, ...] = ("q", "k", "v")
ONLY_SPLIT = ("Qwen3Attention",)
"""vLLM 0.32's attention modules that do nothing with qkv_proj's output but split it into q, k and v at once: what they
are handed need not be one run of memory (columns of wider rows), nor one tensor (`Parts`)."""
ADDS_O_AT_ONCE = ("Qwen3DecoderLayer",)
"""vLLM 0.32's decoder layers that do nothing with what attention puts out but add it to the residual: what their
``input_layernorm`` hands on as such or, in a model's first layer, reads. The correction of o may be there before."""
Hook = Callable[..., Any]


class Parts:
    """q, k and v as they leave `split`, which is all that the modules `ONLY_SPLIT` do with what qkv_proj puts out.

    Put together as one tensor, a corrected q is a kernel of its own, since that tensor is taken apart again; by itself
    it is computed where it is read, in the kernel of q's norm.
    """

    def __init__(self, *parts: torch.Tensor) -> None:
        self._parts = parts

    def split(self, sizes: Sequence[int], dim: int = -1) -> tuple[torch.Tensor, ...]:
        """The parts, which are cut so already."""
        if list(sizes) != [part.shape[-1] for part in self._parts] or dim != -1:
            raise ValueError(f"q, k and v are {[part.shape[-1] for part in self._parts]} wide, not {sizes} along {dim}")
        return self._parts


def attach(module: Any, memory: MemoryLayer, sizes: tuple[int, int]) -> bool:
    """Hook a memory onto an attention module whose weights have not been loaded yet.

    Args:
        module: has ``o_proj`` and either ``qkv_proj`` or ``q_proj``, ``k_proj``, ``v_proj``.
        memory: becomes the submodule ``deltamem``.
        sizes: local output widths of q and of k (= v), which order the fused output as q | k | v.

    Returns:
        Whether qkv_proj computes the memory's projection too.
    """
    module.deltamem = memory
    module.o_proj.register_forward_hook(_after_o(memory))
    if not hasattr(module, "qkv_proj"):
        for head in QKV:
            linear = getattr(module, f"{head}_proj")
            linear.register_forward_pre_hook(_before_one(memory))
            linear.register_forward_hook(_after_one(memory, head))
        return False
    widths: dict[Head, int] = {"q": sizes[0], "k": sizes[1], "v": sizes[1]}
    appended = can_append(module.qkv_proj)
    if appended:
        append_rows(module.qkv_proj, memory)
    if memory.pages.chain is not None:
        memory.correct_in_rows(widths)
        hand_on = _columns(sum(widths.values()), type(module).__name__ in ONLY_SPLIT)
    else:
        hand_on = _corrected(memory, widths, type(module).__name__ in ONLY_SPLIT)
    module.qkv_proj.register_forward_hook(_after_qkv(memory, appended, hand_on))
    return appended


def attach_to_residual(layer: Any, memory: MemoryLayer) -> None:
    """Have o corrected in the residual, as part of the memory's own call, where decoder layer and kernels allow that.

    Args:
        layer: the decoder layer whose attention has this memory.
    """
    if type(layer).__name__ not in ADDS_O_AT_ONCE or memory.pages.chain is None or not memory.correct_in_residual():
        return

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        memory.add_to(output[1] if isinstance(output, tuple) else args[0])

    layer.input_layernorm.register_forward_hook(hook)


def _after_qkv(memory: MemoryLayer, appended: bool, hand_on: Callable[[torch.Tensor], Any]) -> Hook:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value, *rest = output if isinstance(output, tuple) else (output,)
        rows = value.reshape(-1, value.shape[-1])
        if not appended:
            memory.read(rows, memory.project(args[0]))
        result = hand_on(rows)
        if isinstance(result, torch.Tensor):
            result = result.view(*value.shape[:-1], result.shape[-1])
        return (result, *rest) if isinstance(output, tuple) else result

    return hook


def _columns(width: int, only_split: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hands on q | k | v, corrected in place: as columns of the rows, or copied into one run of memory."""

    def hand_on(rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :width] if only_split else rows[:, :width].contiguous()

    return hand_on


def _corrected(memory: MemoryLayer, widths: Mapping[Head, int], only_split: bool) -> Callable[[torch.Tensor], Any]:
    """Hands on q, k and v corrected: apart, or put together again."""

    def hand_on(rows: torch.Tensor) -> Any:
        made = memory.corrected(rows, widths)
        return Parts(*made) if only_split else torch.cat(made, dim=-1)

    return hand_on


def _before_one(memory: MemoryLayer) -> Hook:
    def hook(module: nn.Module, args: Any) -> None:
        memory.read_once(args[0])

    return hook


def _after_one(memory: MemoryLayer, head: Head) -> Hook:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _changed(output, lambda rows: memory.corrected_one(head, rows))

    return hook


def _after_o(memory: MemoryLayer) -> Hook:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        result = _changed(output, memory.correct_o)
        memory.forget_step()
        return result

    return hook


def _changed(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A linear's output with its rows [T, N] changed; vLLM's linears return (output, bias), the Transformers backend's
    just the output."""
    if isinstance(output, tuple):
        return (_changed(output[0], change), *output[1:])
    rows = change(output.reshape(-1, output.shape[-1]))
    return rows.view(*output.shape[:-1], rows.shape[-1])
