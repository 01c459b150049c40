"""Compiles the Triton kernels for GPUs that need not be there: ``python compile_triton.py 80 90 100``.

In a process of its own, without ``TRITON_INTERPRET``. Prints a line per kernel, shape and compute capability.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltamem_vllm.ops import triton_chunked, triton_kernels

POINTERS = {
    **dict.fromkeys(("bias", "pages", "reads", "queries", "summaries", "starts", "states", "staging", "out"), "*fp32"),
    **dict.fromkeys(("block_table", "query_start_loc", "seq_lens", "write_limit", "unwritten"), "*i32"),
    **dict.fromkeys(("block_ids", "counts", "slots", "sources"), "*i32"),
    "addresses": "*i64",
}
#: (rank, its power of two, that of rank + 1, heads, rankwise, λ of its own, mode, normalised, dtype of projected)
SHAPES = [
    (8, 8, 16, 1, True, False, 0, True, "*bf16"),
    (16, 16, 32, 4, True, True, 1, True, "*fp16"),
    (5, 8, 8, 2, False, False, 2, False, "*fp32"),
]
KERNELS = [
    triton_kernels.page_scan_kernel,
    triton_kernels.page_state_kernel,
    triton_kernels.take_kernel,
    triton_kernels.seed_kernel,
    triton_chunked.activate_kernel,
    triton_chunked.combine_kernel,
    triton_chunked.rescan_kernel,
]


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for rank, power, above, heads, rankwise, has_lambda, mode, normalize, projected in SHAPES:
            constants = {
                "R": rank, "RP": power, "VP": above, "H": heads, "RANKWISE": rankwise, "HAS_LAMBDA": has_lambda,
                "MODE": mode, "NORMALIZE": normalize, "L": 36, "STAGED": True, "FLOATS": heads * rank * rank,
                "POWER": 1 << (heads * rank * rank - 1).bit_length(),
            }  # fmt: skip
            for kernel in KERNELS:
                own = {name: constants[name] for name in kernel.arg_names if name in constants}
                types = {**POINTERS, **dict.fromkeys(own, "constexpr"), "projected": projected, "page_stride": "i64"}
                signature = {name: types.get(name, "i32") for name in kernel.arg_names}
                source = ASTSource(fn=kernel, signature=signature, constexprs=own)
                warps = 4 if rank > 8 and kernel in KERNELS[4:6] else 1
                built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
                print(f"sm_{capability} r{rank} {kernel.__name__} {len(built.asm['cubin'])}", flush=True)


if __name__ == "__main__":
    main()
