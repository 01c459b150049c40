"""One real ``vllm serve --plugin deltamem`` for all tests here that need one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltamem_vllm.demo.server import ONE_WORKER, VllmServer
from tests.server.talk import API_KEY, Talk

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "qwen3_tsw_r8"
MODEL, ADAPTER = FIXTURE / "model", FIXTURE / "adapter"
HERE = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)}
"""Environment of a server that is to run this checkout."""
FLAGS = (
    "--dtype float32 --block-size 32 --max-model-len 1024 --enforce-eager --served-model-name m --max-logprobs 20 "
    f"--api-key {API_KEY} --deltamem-queue-depth 2 --deltamem-queue-seconds 30 "
    "--enable-auto-tool-choice --tool-call-parser pythonic "
    '--structured-outputs-config {"backend":"xgrammar","disable_any_whitespace":true}'  # else a random model pads JSON
).split()
FLAGS += [*ONE_WORKER, "--logits-processors", "tests.server.slow:Slow"]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's adapter with a longer memory: it forgets within some 20 tokens, which hides what lies before."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    shutil.copytree(ADAPTER, folder)
    weights = torch.load(folder / "delta_mem_adapter.pt", weights_only=True)
    for name, weight in weights.items():
        if name.endswith("beta_bias"):  # rows forget at rates from 1/20 to 1/1000
            weights[name] = torch.linspace(-3, -7, weight.numel()).to(weight.dtype)
        if name.endswith("beta_proj"):
            weights[name] = weight * 0.1
    torch.save(weights, folder / "delta_mem_adapter.pt")
    return folder


@pytest.fixture(scope="session")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server that is ready. A test that kills it starts it again."""
    folder = tmp_path_factory.mktemp("server")
    made = VllmServer(MODEL, adapter, f"sqlite:///{folder}/sessions.db", *FLAGS, env=HERE, log=folder / "log")
    with made:
        made.wait_ready()
        yield made


@pytest.fixture
def talk(server: VllmServer) -> Iterator[Talk]:
    """A client of the server; afterwards the server must still be well."""
    with Talk(server.base_url) as made:
        yield made
    assert server.healthy(), server.last_lines(40)
