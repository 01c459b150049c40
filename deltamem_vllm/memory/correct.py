"""Adding the memory's reads to what a linear put out."""

import torch
from torch import Tensor

LARGEST_UNROLLED = 32
"""Reads per token up to which a compiled correction is written out term by term."""


def correct(out: Tensor, reads: Tensor, matrix: Tensor) -> Tensor:
    """``out + reads · matrix``, the correction of one linear; a new tensor.

    While a graph is compiled and R is at most `LARGEST_UNROLLED`, this is a sum of R products, element by element in
    fp32 and rounded once to ``out``'s dtype. Inductor puts such a sum into the kernel that reads the result (a head
    norm, a residual add with its norm), so that a correction starts no kernel of its own. It does not do so with
    ``(reads[:, :, None] * matrix).sum(1)``, a reduction, nor where the result is concatenated with other columns
    and split again: whoever corrects q hands it on as a tensor of its own.

    Else it is one matrix product in ``out``'s dtype, the reads rounded to it first; 16-bit products sum in fp32.

    Args:
        out: [T, N] floating point; its rows may be columns of a wider tensor.
        reads: [T, R] fp32.
        matrix: [R, N], scaled already, of any floating dtype; that of ``out`` saves a cast.
    """
    rank = matrix.shape[0]
    if not torch.compiler.is_compiling() or rank > LARGEST_UNROLLED:
        return torch.addmm(out, reads.to(out.dtype), matrix.to(out.dtype))
    total = out.float()
    for j in range(rank):
        total = total + reads[:, j : j + 1] * matrix[j].float()
    return total.to(out.dtype)
