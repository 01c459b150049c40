from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.pooled import PoolOps, pool_ops


@pytest.fixture(params=["avx512", "avx2", "portable", "torch"])
def ops(request: pytest.FixtureRequest) -> Iterator[PagedOps]:
    """Each implementation of the paged delta rule, native once per instruction set that this CPU runs.

    Native must be built: no skip hides it.
    """
    if request.param == "torch":
        yield select("cpu", "torch")
        return
    try:
        native = select("cpu", "native")
    except ConfigError as error:
        pytest.fail(f"{error}")
    if not torch.ops.deltamem_native.force_isa(request.param):
        pytest.skip(f"this CPU cannot run the {request.param} build")
    yield native
    torch.ops.deltamem_native.force_isa("")


@pytest.fixture
def pool(ops: PagedOps) -> PoolOps:
    """Seeds and takes: the implementation's own, or layer by layer."""
    return pool_ops(ops)
